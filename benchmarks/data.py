"""Building and reading of records, beside their limits, on one generated corpus.

    python benchmarks/data.py ice_text.model alpaca_zh_*.json --samples 2000000

The corpus repeats the records of the files named, each time with another number, as JSON lines.
Building is laid beside bare SentencePiece: as many processes, the very same texts, with whitespace
already marked, nothing kept. Both backends, and `datasets` (pip install datasets) with its map and
Arrow file, are built from the same corpus and read in the same random order.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from chatglm.batches import BatchPlan, SampleDataset, build_loader  # noqa: E402
from chatglm.builder import build_records  # noqa: E402
from chatglm.corpus import read_paragraphs  # noqa: E402
from chatglm.formats import parse_record  # noqa: E402
from chatglm.pieces import mark_whitespace  # noqa: E402
from chatglm.prompts import build_prompt  # noqa: E402
from chatglm.records import RecordFolder  # noqa: E402
from chatglm.shards import RECORDS_TOGETHER, BuildPlan, InputFile, cut_blocks  # noqa: E402
from chatglm.sources import parse_json  # noqa: E402
from chatglm.strategies import CutRules, SpecialTokens  # noqa: E402
from chatglm.tokenizer import ChatGLMTokenizer  # noqa: E402

READS, BATCH = 300_000, 32


def write_corpus(path: str, sources: list[str], count: int) -> None:
    """`count` paragraphs, one a line, of the sources' records in random order."""
    records = list(read_paragraphs(sources, skip_bad=True))
    generator = random.Random(0)
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        for number in range(count):
            (question, answer), *more = generator.choice(records)
            rounds = [(f"{question} {number}", answer), *more]
            line = {"id": number, "paragraph": [{"q": q, "a": a} for q, a in rounds]}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    os.replace(f"{path}.part", path)


def peak_memory(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds that a call takes, and the most memory of its processes together, in GiB."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            whole = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    whole += process.memory_full_info().uss
                except psutil.Error:
                    continue  # it has ended
            peak[0] = max(peak[0], whole / 2**30)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        work()
    finally:
        seconds = time.perf_counter() - start
        done.set()
        watcher.join()
    return seconds, peak[0]


def encode_bare(vocab_file: str, path: str, part: int, parts: int) -> float:
    """Seconds of SentencePiece alone over every `parts`-th block; the texts are made before."""
    model, seconds = ChatGLMTokenizer(vocab_file).sp_model, 0.0
    for block in itertools.islice(cut_blocks([InputFile(path, "paragraph")]), part, None, parts):
        paragraphs = [parse_record(parse_json(raw), "paragraph") for _, raw in block.records()]
        for first in range(0, len(paragraphs), RECORDS_TOGETHER):
            chunk = paragraphs[first : first + RECORDS_TOGETHER]
            texts = [mark_whitespace(text) for rounds in chunk for i, (q, a) in enumerate(rounds)
                     for text in (build_prompt(q, rounds[:i]), a)]  # fmt: skip
            start = time.perf_counter()
            model.encode(texts, num_threads=1)
            seconds += time.perf_counter() - start
    return seconds


def bare(vocab_file: str, path: str, processes: int) -> float:
    """Seconds of the slowest of the processes."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        work = [(vocab_file, path, part, processes) for part in range(processes)]
        return max(pool.starmap(encode_bare, work))


def build(vocab_file: str, path: str, folder: str, *, backend: str, processes: int) -> None:
    """What python data_utils.py does."""
    tokenizer = ChatGLMTokenizer(vocab_file)
    special = SpecialTokens(
        tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    )
    rules = CutRules(1024, "truncation", 1, None, 1)
    plan = BuildPlan(vocab_file, special, rules, backend, 42)  # type: ignore[arg-type]
    shutil.rmtree(folder, ignore_errors=True)
    build_records(
        folder, [InputFile(path, "paragraph")], plan, {}, num_workers=processes, max_rejected=0.0
    )


def build_arrow(vocab_file: str, path: str, folder: str, *, processes: int) -> None:
    """The same ids with datasets.map, as its users would; first rounds only."""
    import datasets

    tokenizer = ChatGLMTokenizer(vocab_file)

    def encode(batch: dict[str, list]) -> dict[str, list]:
        rounds = [paragraph[0] for paragraph in batch["paragraph"]]
        prompts = tokenizer.encode_texts([one["q"] for one in rounds], num_threads=1)
        answers = tokenizer.encode_texts([one["a"] for one in rounds], num_threads=1)
        opening = [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        ids = [[*prompt, *opening, *answer, tokenizer.eos_token_id]
               for prompt, answer in zip(prompts, answers, strict=True)]  # fmt: skip
        return {"input_ids": ids, "context_length": [len(prompt) + 1 for prompt in prompts]}

    shutil.rmtree(folder, ignore_errors=True)
    loaded = datasets.load_dataset("json", data_files=path, split="train", cache_dir=folder)
    loaded.map(
        encode, batched=True, num_proc=processes, remove_columns=loaded.column_names
    ).save_to_disk(f"{folder}/built")


def reads_a_second(read: Callable[[int], Any], count: int) -> float:
    """Of READS samples in random order, once the file is in memory."""
    order = np.random.default_rng(0).integers(0, count, READS).tolist()
    for _ in range(2):
        start = time.perf_counter()
        for number in order:
            read(number)
        seconds = time.perf_counter() - start
    return READS / seconds


def batches_a_second(folder: RecordFolder, *, packing: bool) -> tuple[float, float]:
    """Batches and tokens a second of training's loader, of BATCH samples in random order."""
    plan = BatchPlan(folder.lengths()[1], batch_size=BATCH, shuffle_seed=0)
    loader = build_loader(SampleDataset(folder), plan, pad_token_id=3, packing=packing)
    start = time.perf_counter()
    tokens = [int(batch["num_tokens"]) for batch in itertools.islice(loader, READS // BATCH)]
    seconds = time.perf_counter() - start
    return len(tokens) / seconds, sum(tokens) / seconds


def main() -> None:
    """Write the corpus, build and read; one table each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--arrow-samples", type=int, default=100_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", default="/tmp/chatglm-data")
    given = parser.parse_args()
    os.makedirs(given.work, exist_ok=True)
    print("| built with | samples | seconds | samples/s | of bare | peak GiB |", flush=True)
    print("|---|---|---|---|---|---|", flush=True)
    for count in (given.samples // 10, given.samples):
        path = f"{given.work}/corpus-{count}.jsonl"
        if not os.path.exists(path):
            write_corpus(path, given.sources, count)
        for _ in range(given.rounds if count == given.samples else 1):
            limit = bare(given.tokenizer, path, given.processes)
            samples = 0
            for backend in ("record", "lmdb"):
                folder = f"{given.work}/{backend}"
                seconds, peak = peak_memory(
                    lambda path=path, folder=folder, backend=backend: build(
                        given.tokenizer, path, folder, backend=backend, processes=given.processes
                    )
                )
                samples = len(RecordFolder(folder))
                print(f"| {backend}, {given.processes} processes | {samples:,} | {seconds:.1f} |"
                      f" {samples / seconds:,.0f} | {limit / seconds:.2f} | {peak:.2f} |",
                      flush=True)  # fmt: skip
            print(f"| bare SentencePiece | {samples:,} | {limit:.1f} | {samples / limit:,.0f} | 1 |"
                  " |", flush=True)  # fmt: skip
    readers: dict[str, Callable[[int], Any]] = {}
    count = 0
    for backend in ("record", "lmdb"):
        folder = RecordFolder(f"{given.work}/{backend}")
        readers[backend], count = folder.__getitem__, len(folder)
    try:
        import datasets
    except ImportError:
        print("datasets is not installed: pip install datasets")
    else:
        path = f"{given.work}/corpus-{given.arrow_samples}.jsonl"
        write_corpus(path, given.sources, given.arrow_samples)
        seconds, peak = peak_memory(
            lambda: build_arrow(
                given.tokenizer, path, f"{given.work}/arrow", processes=given.processes
            )
        )
        print(f"| datasets.map to Arrow | {given.arrow_samples:,} | {seconds:.1f} |"
              f" {given.arrow_samples / seconds:,.0f} | | {peak:.2f} |", flush=True)  # fmt: skip
        built = datasets.load_from_disk(f"{given.work}/arrow/built").with_format("numpy")
        readers["Arrow"] = lambda number: built[number % given.arrow_samples]["input_ids"]
    print("\n| read in random order from | samples/s, one process |\n|---|---|")
    for name, read in readers.items():
        print(f"| {name} | {reads_a_second(read, count):,.0f} |", flush=True)
    print(f"\n| batches of {BATCH} | batches/s, one process | tokens/s |\n|---|---|---|")
    for name, packing in (("packed", True), ("padded", False)):
        batches, tokens = batches_a_second(RecordFolder(f"{given.work}/record"), packing=packing)
        print(f"| {name} | {batches:,.0f} | {tokens:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
