"""Building records: the same bytes however, restart, formats, and bad records counted."""

import gzip
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

import data_utils
from chatglm import builder
from chatglm.builder import BuildPlan, InputFile, build_records, cut_blocks, reason_to_rebuild
from chatglm.corpus import read_paragraphs
from chatglm.errors import ToolkitError
from chatglm.records import RecordFolder, read_manifest
from chatglm.strategies import CutRules, SpecialTokens
from chatglm.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[1]
BUNDLED = str(ROOT / "data" / "finetune_train_examples.json")
PARAGRAPHS = list(read_paragraphs([BUNDLED]))
RULES = {"strategy": "truncation", "ensure_answer_min_length": 1, "sliding_size": None, "p": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [text for rounds in PARAGRAPHS for one in rounds for text in one]
    return train_tokenizer(texts, str(tmp_path_factory.mktemp("vocabulary")), vocab_size=2432)


@pytest.fixture
def plan(tokenizer):
    def plan(*, max_seq_length=1024, backend="record", seed=42, **rules):
        special = (tokenizer.gmask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        rules = CutRules(max_seq_length=max_seq_length, **{**RULES, **rules})
        return BuildPlan(tokenizer.vocab_file, SpecialTokens(*special), rules, backend, seed)

    return plan


@pytest.fixture
def small_blocks(monkeypatch):
    """Twenty shards out of the bundled examples; the blocks are cut in this process."""
    monkeypatch.setattr(builder, "BLOCK_BYTES", 2000)


def build(folder, plan, *files, num_workers=1, max_rejected=0.0, source=None):
    files = [file if isinstance(file, InputFile) else InputFile(file, "paragraph")
             for file in files or [BUNDLED]]  # fmt: skip
    build_records(
        str(folder),
        files,
        plan,
        source or {},
        num_workers=num_workers,
        max_rejected=max_rejected,
    )
    found = RecordFolder(str(folder))
    return [found[number] for number in range(len(found))]


def all_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@pytest.mark.parametrize("backend", ["record", "lmdb"])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, plan, small_blocks, backend):
    made = plan(backend=backend, max_seq_length=40, strategy="single_sliding", p=-1)
    for workers in (1, 2):
        build(tmp_path / str(workers), made, num_workers=workers)
    one, two = (all_bytes(tmp_path / name) for name in ("1", "2"))
    assert one == two
    assert len(read_manifest(str(tmp_path / "1"))["shards"]) > 10
    assert not multiprocessing.active_children()


def test_one_block_needs_no_other_process(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(builder, "ProcessPoolExecutor", None)
    build(tmp_path / "train", plan(), num_workers=8)


def test_shards_change_nothing_about_the_samples(tmp_path, plan, monkeypatch):
    whole = build(tmp_path / "one", plan())
    monkeypatch.setattr(builder, "BLOCK_BYTES", 3000)
    assert build(tmp_path / "many", plan()) == whole


def as_messages(rounds, keys, roles):
    spoken = [text for one in rounds for text in one]
    return [{keys[0]: roles[n % 2], keys[1]: text} for n, text in enumerate(spoken)]


def write_as(folder, form):
    """The bundled paragraphs in a file of another kind and format."""
    if form == "alpaca":
        path = folder / "alpaca.json"
        records = [
            {"instruction": rounds[-1][0], "input": "", "output": rounds[-1][1],
             "history": [list(one) for one in rounds[:-1]]}
            for rounds in PARAGRAPHS
        ]  # fmt: skip
        path.write_text(json.dumps(records, ensure_ascii=False, indent=1), encoding="utf-8")
    elif form == "sharegpt":
        path = folder / "sharegpt.jsonl.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            for rounds in PARAGRAPHS:
                spoken = as_messages(rounds, ("from", "value"), ("human", "gpt"))
                file.write(json.dumps({"conversations": spoken}, ensure_ascii=False) + "\n")
    else:
        path = folder / "openai.parquet"
        rows = [
            {"messages": as_messages(rounds, ("role", "content"), ("user", "assistant"))}
            for rounds in PARAGRAPHS
        ]
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=50)
    return InputFile(str(path), form)


@pytest.mark.parametrize("form", ["alpaca", "sharegpt", "openai"])
def test_the_same_texts_in_another_format_give_the_same_samples(tmp_path, plan, form):
    assert build(tmp_path / "other", plan(), write_as(tmp_path, form)) == build(
        tmp_path / "own", plan()
    )


@pytest.mark.parametrize("strategy", ["truncation", "single_sliding", "double_sliding"])
def test_every_answer_token_is_learned_once_or_counted_as_cut(tmp_path, plan, tokenizer, strategy):
    samples = build(tmp_path / "train", plan(strategy=strategy, max_seq_length=40, p=0))
    counts = read_manifest(str(tmp_path / "train"))["counts"]
    assert counts["rounds"] == sum(map(len, PARAGRAPHS)) and counts["longest"] <= 40
    learned = [t for sample in samples for t in sample.input_ids[sample.context_length + 1 :]]
    answers = tokenizer.encode_texts([answer for rounds in PARAGRAPHS for _, answer in rounds])
    everything = [t for ids in answers for t in [*ids, tokenizer.eos_token_id]]
    if strategy == "truncation":
        assert counts["answers_cut"] > 0 and len(learned) < len(everything)
    else:
        assert learned == everything and counts["rounds_in_windows"] > 0


# Restart.


def command(folder, plan):
    """A build of its own process, which says each finished shard and dawdles."""
    program = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from chatglm import builder
from chatglm.builder import *
builder.BLOCK_BYTES = 2000
def slowly(blocks, *args, **kwargs):
    for note in build(blocks, *args, **kwargs):
        print(note.name, flush=True)
        time.sleep(0.2)
        yield note
build, builder.build_shards = builder.build_shards, slowly
plan = BuildPlan({plan.vocab_file!r}, {plan.special!r}, {plan.rules!r}, "record", 42)
builder.build_records({str(folder)!r}, [InputFile({BUNDLED!r}, "paragraph")], plan, {{}},
                      num_workers=2, max_rejected=0.0)
"""
    return [sys.executable, "-c", program]


def test_a_killed_build_goes_on_after_its_finished_shards(tmp_path, plan, small_blocks, capsys):
    undisturbed = tmp_path / "undisturbed"
    build(undisturbed, plan())
    folder = tmp_path / "train"
    process = subprocess.Popen(command(folder, plan()), stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        assert process.stdout.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    part = Path(f"{folder}.part")
    finished = {path: path.stat().st_mtime_ns for path in part.glob("*.record")
                if path.with_suffix(".json").exists()}  # fmt: skip
    assert len(finished) >= 3 and not folder.exists()
    assert not psutil.wait_procs(workers, timeout=10)[1], "workers outlive their parent"
    capsys.readouterr()
    build(folder, plan())
    assert "going on after" in capsys.readouterr().out
    assert all_bytes(folder) == all_bytes(undisturbed)
    assert all((folder / path.name).stat().st_mtime_ns == time for path, time in finished.items())


def test_other_settings_or_files_start_anew(tmp_path, plan, small_blocks, monkeypatch):
    def cut_off(*_):
        raise KeyboardInterrupt

    part = tmp_path / "train.part"
    with monkeypatch.context() as patch:
        patch.setattr(builder, "draw_lengths", cut_off)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "train", plan(), source={"tokenizer": "a"})
    shard = next(part.glob("*.record"))
    shard.write_bytes(b"would stay if it were taken up")
    samples = build(tmp_path / "train", plan(), source={"tokenizer": "b"})
    assert len(samples) == sum(map(len, PARAGRAPHS)) and not part.exists()


# Reasons to build.


def test_whatever_changed_is_the_reason_to_rebuild(tmp_path, plan):
    copy = tmp_path / "data.json"
    copy.write_bytes(Path(BUNDLED).read_bytes())
    folder, files = str(tmp_path / "train"), [InputFile(str(copy), "paragraph")]
    source = {"tokenizer": "t", "strategy": ["truncation", 1]}
    assert reason_to_rebuild(folder, files, source) == "not built yet"
    build(folder, plan(), *files, source=source)
    assert reason_to_rebuild(folder, files, source) is None
    os.utime(copy)  # touched, but the same
    assert reason_to_rebuild(folder, files, source) is None
    for key in source:
        assert reason_to_rebuild(folder, files, {**source, key: "x"}) == f"{key} changed"
    assert reason_to_rebuild(folder, [InputFile(BUNDLED, "paragraph")], source) == "data changed"
    copy.write_bytes(copy.read_bytes().replace("南京".encode(), "北京".encode()))
    assert reason_to_rebuild(folder, files, source) == "data changed"
    copy.write_bytes(Path(BUNDLED).read_bytes())
    with (Path(folder) / "00000.record").open("ab") as file:
        file.write(b"x")
    assert reason_to_rebuild(folder, files, source) == "a file of it was changed"


# Bad records.


@pytest.fixture
def half_bad(tmp_path):
    path = tmp_path / "half.jsonl"
    good = json.dumps({"paragraph": [{"q": "问", "a": "答"}]}, ensure_ascii=False)
    path.write_text(f'{good}\n\n{{"paragraph": []}}\n{good}\n nonsense\n', encoding="utf-8")
    return str(path)


def test_bad_records_are_written_down_and_counted(tmp_path, plan, half_bad):
    assert len(build(tmp_path / "train", plan(), half_bad, max_rejected=0.5)) == 2
    counts = read_manifest(str(tmp_path / "train"))["counts"]
    assert (counts["records"], counts["rejected"]) == (2, 2)
    lines = (tmp_path / "train.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = map(json.loads, lines)
    assert (first["file"], first["line"], first["record"]) == (half_bad, 3, '{"paragraph": []}')
    assert "expected" in first["reason"]
    assert (second["line"], second["record"]) == (5, "nonsense")
    build(tmp_path / "train", plan())
    assert not (tmp_path / "train.rejected.jsonl").exists()


def test_more_bad_records_than_allowed_stop_the_build(tmp_path, plan, half_bad):
    build(tmp_path / "train", plan())
    before = all_bytes(tmp_path / "train")
    with pytest.raises(ToolkitError) as caught:
        build(tmp_path / "train", plan(), half_bad, max_rejected=0.49)
    assert f"{half_bad}:3: " in str(caught.value) and "2 of 4 records" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all_bytes(tmp_path / "train") == before
    assert len((tmp_path / "train.rejected.jsonl").read_text().splitlines()) == 2


def test_a_build_that_goes_wrong_stops_before_its_end(tmp_path, plan, half_bad, monkeypatch):
    monkeypatch.setattr(builder, "BLOCK_BYTES", 50)
    monkeypatch.setattr(builder, "ENOUGH_TO_JUDGE", 2)
    with pytest.raises(ToolkitError, match="of 2 records"):
        build(tmp_path / "train", plan(), half_bad)


def test_an_error_in_a_worker_is_told_in_one_line(tmp_path, plan, small_blocks):
    broken = plan()
    broken = BuildPlan("/absent.model", broken.special, broken.rules, "record", 42)
    with pytest.raises(ToolkitError):
        build(tmp_path / "train", broken, num_workers=2)


def test_the_script_says_format_and_bad_records_and_ends_with_2(
    tmp_path, half_bad, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    flags = ["--output_dir", str(tmp_path / "output"), "--eval_file", "[]"]
    with pytest.raises(SystemExit) as caught:
        data_utils.run_script(
            lambda _: data_utils.main([*flags, "--train_file", json.dumps([half_bad])])
        )
    assert caught.value.code == 2
    assert f"{half_bad}:3: " in capsys.readouterr().err
    data_utils.main([*flags, "--train_file", json.dumps([BUNDLED]), "--verify", "true"])
    said = capsys.readouterr().out
    assert "format paragraph" in said and "every sample has its checksum" in said


def test_blocks_are_cut_in_order_and_hold_every_record(small_blocks):
    blocks = list(cut_blocks([InputFile(BUNDLED, "paragraph"), InputFile(BUNDLED, "paragraph")]))
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert np.all(np.diff([block.file for block in blocks]) >= 0)
    for file in (0, 1):
        lines = [line for block in blocks if block.file == file for line in block.lines]
        assert lines == list(range(1, len(PARAGRAPHS) + 1))
