"""Decoding at the true size with random weights, beside the model's plain forward pass.

    python benchmarks/decode.py                    # the whole table, on a GPU
    python benchmarks/decode.py --only int4 fp16

Tokens/s are those of the whole loop, prompt excluded: choosing, looking for the end, and, at batch
1, the text of a stream. The copy and the read of a large tensor say what this card's memory gives.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from benchmarks.random_model import random_model  # noqa: E402
from chatglm import decoding  # noqa: E402
from chatglm.configuration import ChatGLMConfig  # noqa: E402
from chatglm.decoding import generate_tokens  # noqa: E402
from chatglm.drafts import DraftedStep  # noqa: E402
from chatglm.growing_text import GrowingText  # noqa: E402
from chatglm.model import ChatGLMForConditionalGeneration  # noqa: E402
from chatglm.sampling import Sampling  # noqa: E402
from chatglm.steps import CapturedStep, forget_steps  # noqa: E402
from chatglm.tokenizer import train_tokenizer  # noqa: E402

GIB = 2**30
KINDS = {"fp16": (0, torch.float16), "bf16": (0, torch.bfloat16), "int8": (8, torch.float16),
         "int4": (4, torch.float16)}  # fmt: skip
GREEDY, SAMPLED = Sampling(do_sample=False), Sampling()


def build(kind: str) -> ChatGLMForConditionalGeneration:
    """The true shape; head and embedding are one tensor, as in the pretrained weights."""
    bits, dtype = KINDS[kind]
    config = ChatGLMConfig(quantization_bit=bits)
    return random_model(config, dtype=dtype, device="cuda")


def prompts(model, rows: int, length: int) -> torch.Tensor:
    """Random tokens, then [gMASK] <sop>."""
    config = model.config
    ids = torch.randint(1000, 100_000, (rows, length), device="cuda")
    ids[:, -2], ids[:, -1] = config.gmask_token_id, config.bos_token_id
    return ids


def rate(
    model, rows: int, length: int, new: int, sampling: Sampling, tokenizer=None, **options
) -> float:
    """Tokens/s of all rows after the first token; the second of two answers counts."""
    seconds = 0.0
    for _ in range(2):
        ids = prompts(model, rows, length)
        answer = None if tokenizer is None else GrowingText(tokenizer.decode)
        for number, tokens in enumerate(generate_tokens(
            model, ids, max_new_tokens=new, sampling=sampling, eos_token_ids=[-1], **options
        )):  # fmt: skip
            if number == 0:
                start = time.perf_counter()
            if answer is not None:
                answer.add(int(tokens[0]))
        seconds = time.perf_counter() - start
    return rows * (new - 1) / seconds


def first_token(model, length: int) -> float:
    """Milliseconds to the first token, the median of 5."""
    times = []
    for _ in range(6):
        ids = prompts(model, 1, length)
        torch.cuda.synchronize()
        start = time.perf_counter()
        next(iter(generate_tokens(
            model, ids, max_new_tokens=64, sampling=GREEDY, eos_token_ids=[-1]
        )))  # fmt: skip
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def plainly(work: Callable[[], float]) -> float:
    """The same by the plain loop."""
    kept = decoding._reason_for_plain_steps
    decoding._reason_for_plain_steps = lambda *_: "the second side of the benchmark"
    try:
        return work()
    finally:
        decoding._reason_for_plain_steps = kept


def memory_rates() -> tuple[float, float]:
    """TB/s of a copy (read and written) and of a read of 8 GB."""
    source = torch.empty(2 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)

    def timed(work: Callable[[], object]) -> float:
        times = []
        for _ in range(7):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)

    copied = 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e12
    return copied, source.nbytes / timed(lambda: source.sum()) / 1e12


@torch.inference_mode()
def drafted_pass(model, drafted: int) -> float:
    """Milliseconds of a pass over the last token and so many drafts, after a prompt of 512."""
    step = DraftedStep(model, rows=1 + drafted, room=1024, cache_bits=16)
    step.read(prompts(model, 1, 512)).start()
    tokens = list(range(1000, 1001 + drafted))
    step.check(tokens)
    start = time.perf_counter()
    for _ in range(40):
        step.check(tokens)
        step.keep(1)
    return 1e3 * (time.perf_counter() - start) / 40


@torch.inference_mode()
def cache_error(model) -> float:
    """Of the scores after 512 + 32 tokens over a cache of int8, relative to one of 16 bits."""
    ids, scores = prompts(model, 1, 512), []
    forced = torch.randint(1000, 100_000, (32,)).tolist()
    for bits in (16, 8):
        step = CapturedStep(model, rows=1, room=1024, cache_bits=bits)
        step.prefill(ids, None)
        step.set_rules(GREEDY, seed=0, so_far=ids)
        step.first_token()
        for token in forced:
            step.hidden.copy_(model.transformer.word_embeddings.weight[token])
            step.next_token()
        scores.append(step.scores.float().clone())
    return float((scores[1] - scores[0]).norm() / scores[0].norm())


def peak_memory(model, **options) -> float:
    """GiB at the most for an answer that fills all 2048 tokens."""
    forget_steps()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ids = prompts(model, 1, 1536)
    for _ in generate_tokens(
        model, ids, max_new_tokens=512, sampling=SAMPLED, eos_token_ids=[-1], **options
    ):
        pass
    return torch.cuda.max_memory_allocated() / GIB


def measure(kind: str, tokenizer) -> None:
    """Print one kind's rows."""
    model = build(kind)

    def show(what: str, unit: str, value: float, plain: float | None = None) -> None:
        beside = "" if plain is None else f"{plain:,.1f}"
        print(f"| {kind} | {what} | {value:,.2f} {unit} | {beside} |", flush=True)

    peak, peak_of_int8 = peak_memory(model), peak_memory(model, kv_cache_bits=8)
    for name, sampling in (("greedy", GREEDY), ("sampled", SAMPLED)):
        fast = rate(model, 1, 512, 256, sampling, tokenizer)
        plain = plainly(lambda sampling=sampling: rate(model, 1, 512, 48, sampling, tokenizer))
        show(f"batch 1, prompt 512, {name}", "tok/s", fast, plain)
    for rows in (8, 32):
        show(f"batch {rows}, prompt 512, sampled", "tok/s", rate(model, rows, 512, 128, SAMPLED),
             plainly(lambda rows=rows: rate(model, rows, 512, 16, SAMPLED)))  # fmt: skip
    show("first token, prompt 1536", "ms", first_token(model, 1536),
         plainly(lambda: first_token(model, 1536)))  # fmt: skip
    show("peak memory, 2048 tokens", "GiB", peak)
    show("the same, cache of int8", "GiB", peak_of_int8)
    show("batch 32, sampled, cache of int8", "tok/s",
         rate(model, 32, 512, 128, SAMPLED, kv_cache_bits=8))  # fmt: skip
    show("error of scores by a cache of int8", "%", 100 * cache_error(model))
    for drafted in (3, 7):
        show(f"a pass of 1 + {drafted} drafted tokens", "ms", drafted_pass(model, drafted))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    given = parser.parse_args()
    copied, read = memory_rates()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: copy {copied:.2f} TB/s, read {read:.2f} TB/s")
    print("| weights | what | here | plain |\n|---|---|---|---|", flush=True)
    texts = open(f"{ROOT}/data/finetune_train_examples.json", encoding="utf-8").readlines()  # noqa: SIM115
    tokenizer = train_tokenizer(texts, "/tmp/chatglm-decode", vocab_size=2000)
    for kind in given.only:
        measure(kind, tokenizer)
        forget_steps()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
