"""Building records: the same bytes however, restart, formats, and bad records counted."""

import codecs
import gzip
import itertools
import json
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow
import pyarrow.parquet
import pytest

import data_utils
from chatglm import builder, shards, workers
from chatglm.builder import build_records, reason_to_rebuild
from chatglm.corpus import read_paragraphs
from chatglm.errors import ToolkitError
from chatglm.files import recover_folder
from chatglm.ray_workers import build_shards_with_ray
from chatglm.records import RecordFolder, read_manifest
from chatglm.shards import BuildPlan, InputFile, cut_blocks
from chatglm.sources import parse_json
from chatglm.strategies import CutRules, SpecialTokens
from chatglm.tokenizer import train_tokenizer
from chatglm.workers import build_shards

from .conftest import fill
from .processes import ended, fork

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
    monkeypatch.setattr(shards, "BLOCK_BYTES", 2000)


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
    for number in (1, 2):
        build(tmp_path / str(number), made, num_workers=number)
    one, two = (all_bytes(tmp_path / name) for name in ("1", "2"))
    assert one == two
    assert len(read_manifest(str(tmp_path / "1"))["shards"]) > 10
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_same_bytes_as_processes(tmp_path, plan, small_blocks):
    ray = pytest.importorskip("ray")
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"paragraph": []}\n')
    try:
        for name, how in (("ray", build_shards_with_ray), ("own", build_shards)):
            files = [InputFile(path, "paragraph") for path in (BUNDLED, str(bad))]
            limits = {"num_workers": 2, "max_rejected": 0.1}
            build_records(str(tmp_path / name), files, plan(), {}, build_shards=how, **limits)
    finally:
        ray.shutdown()
    assert all_bytes(tmp_path / "ray") == all_bytes(tmp_path / "own")
    rejected = [Path(f"{tmp_path / name}.rejected.jsonl").read_text() for name in ("ray", "own")]
    assert rejected[0] == rejected[1]


def test_one_block_needs_no_other_process(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(workers, "ProcessPoolExecutor", None)
    build(tmp_path / "train", plan(), num_workers=8)


def test_shards_change_nothing_about_the_samples(tmp_path, plan, monkeypatch):
    whole = build(tmp_path / "one", plan())
    monkeypatch.setattr(shards, "BLOCK_BYTES", 3000)
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
from chatglm import builder, shards
from chatglm.shards import *
shards.BLOCK_BYTES = 2000
def slowly(blocks, *args, **kwargs):
    for note in builder.build_shards(blocks, *args, **kwargs):
        print(note.name, flush=True)
        time.sleep(0.2)
        yield note
plan = BuildPlan({plan.vocab_file!r}, {plan.special!r}, {plan.rules!r}, "record", 42)
builder.build_records({str(folder)!r}, [InputFile({BUNDLED!r}, "paragraph")], plan, {{}},
                      num_workers=2, max_rejected=0.0, build_shards=slowly)
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


def build_and_exit(folder, plan, started):
    shards.BLOCK_BYTES = 2000
    Path(started).touch()
    build(folder, plan)


def test_a_build_killed_at_any_moment_goes_on_to_the_same_bytes(tmp_path, plan, small_blocks):
    begin = time.monotonic()
    build(tmp_path / "undisturbed", plan())
    takes, undisturbed = time.monotonic() - begin, all_bytes(tmp_path / "undisturbed")
    for number in range(5):
        folder, started = tmp_path / f"train{number}", tmp_path / f"started{number}"
        process = fork(build_and_exit, folder, plan(), started, preload=["tests.test_builder"])
        with ended([process]):
            while not started.exists():
                time.sleep(0.001)
            moment = random.uniform(0, takes)
            time.sleep(moment)
        if process.exitcode:  # it may have been quicker
            build(folder, plan())
        assert all_bytes(folder) == undisturbed, moment
        assert not Path(f"{folder}.part").exists()


class Killed(BaseException):
    """Nothing catches it."""


def test_a_build_that_ends_between_any_two_changes_of_files_goes_on(tmp_path, plan, monkeypatch):
    """The moments that a kill at random hardly meets: between notes, index, manifest, renames."""
    monkeypatch.setattr(shards, "BLOCK_BYTES", 12_000)
    monkeypatch.setattr(builder, "draw_lengths", lambda path, lengths: Path(path).touch())
    copy, folder = tmp_path / "data.json", tmp_path / "train"
    whole = Path(BUNDLED).read_bytes()

    def change(usual, steps, stop_at, *args):
        if next(steps) == stop_at:
            raise Killed
        usual(*args)

    def build_anew(patch, stop_at=None):
        """An older folder is replaced; ended at a change if there are so many."""
        shutil.rmtree(folder, ignore_errors=True)
        copy.write_bytes(whole[:3000].rpartition(b"\n")[0])
        build(folder, plan(), str(copy))
        copy.write_bytes(whole)
        steps = itertools.count()
        for name in ("replace", "remove"):
            patch.setattr(os, name, partial(change, getattr(os, name), steps, stop_at))
        build(folder, plan(), str(copy))
        return next(steps)

    with monkeypatch.context() as patch:
        number = build_anew(patch)
    expected = all_bytes(folder)
    assert number > 10
    for stop_at in range(number):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            build_anew(patch, stop_at)
        recover_folder(str(folder))
        assert folder.exists()
        if reason_to_rebuild(str(folder), [InputFile(str(copy), "paragraph")], {}):
            build(folder, plan(), str(copy))
        assert comparable(all_bytes(folder)) == comparable(expected), stop_at


def comparable(files):
    """Without the time at which the input was written."""
    manifest = json.loads(files["manifest.json"])
    for state in manifest["files"]:
        del state["modified"]
    return {**files, "manifest.json": manifest}


def test_a_worker_that_is_killed_is_a_line_and_the_same_command_goes_on(
    tmp_path, plan, small_blocks, monkeypatch
):
    def kill_the_workers(block, folder):
        if block.number == 8:
            for process in multiprocessing.active_children():
                process.kill()
            time.sleep(0.3)
        return usual(block, folder)

    usual = workers.finished_note
    with monkeypatch.context() as patch:
        patch.setattr(workers, "finished_note", kill_the_workers)
        with pytest.raises(ToolkitError, match=r"was killed.* lower num_process_worker"):
            build(tmp_path / "train", plan(), num_workers=2)
    assert not multiprocessing.active_children()
    build(tmp_path / "train", plan())
    build(tmp_path / "alone", plan())
    assert all_bytes(tmp_path / "train") == all_bytes(tmp_path / "alone")


def test_damaged_notes_of_a_build_that_was_cut_off_are_written_anew(
    tmp_path, plan, small_blocks, monkeypatch
):
    for name in ("00003.json", "key.json"):
        with monkeypatch.context() as patch:
            patch.setattr(builder, "_finish", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                build(tmp_path / "train", plan())
        (tmp_path / "train.part" / name).write_text("")  # as after a power cut
        build(tmp_path / "train", plan())
    build(tmp_path / "alone", plan())
    assert all_bytes(tmp_path / "train") == all_bytes(tmp_path / "alone")


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, plan, monkeypatch):
    def change(folder, *args):
        with copy.open("ab") as file:
            file.write(b"\n")
        return usual(folder, *args)

    copy, usual = tmp_path / "data.json", builder._build_while_good
    copy.write_bytes(Path(BUNDLED).read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr(builder, "_build_while_good", change)
        with pytest.raises(ToolkitError, match="its files changed meanwhile"):
            build(tmp_path / "train", plan(), str(copy))
    assert not (tmp_path / "train").exists()
    build(tmp_path / "train", plan(), str(copy))


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


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("backend", ["record", "lmdb"])
def test_a_full_disk_is_one_line_and_the_build_goes_on_after_it(
    small_disk, tmp_path, plan, small_blocks, backend, num_workers
):
    build(tmp_path / "undisturbed", plan(backend=backend))
    fill(small_disk, leave=100_000)
    with pytest.raises(ToolkitError) as caught:
        build(small_disk / "train", plan(backend=backend), num_workers=num_workers)
    assert "could not be written" in str(caught.value) and "\n" not in str(caught.value)
    (small_disk / "filler").unlink()
    build(small_disk / "train", plan(backend=backend), num_workers=num_workers)
    assert all_bytes(small_disk / "train") == all_bytes(tmp_path / "undisturbed")


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


def test_a_file_may_be_named_twice(tmp_path, plan):
    folder, files = str(tmp_path / "train"), [InputFile(BUNDLED, "paragraph")] * 2
    once = build(tmp_path / "once", plan())
    assert build(folder, plan(), *files) == once * 2
    assert reason_to_rebuild(folder, files, {}) is None
    assert reason_to_rebuild(folder, files[:1], {}) == "data changed"
    assert reason_to_rebuild(folder, [InputFile(BUNDLED, "alpaca")] * 2, {}) == "data changed"


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
    monkeypatch.setattr(shards, "BLOCK_BYTES", 50)
    monkeypatch.setattr(builder, "ENOUGH_TO_JUDGE", 2)
    with pytest.raises(ToolkitError, match="of 2 records"):
        build(tmp_path / "train", plan(), half_bad)


def test_an_error_in_a_worker_arrives_as_it_is_and_ends_all_of_them(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 500)
    whole = write_as(tmp_path, "openai")
    content = bytearray(Path(whole.path).read_bytes())
    second = pyarrow.parquet.ParquetFile(whole.path).metadata.row_group(1)
    offset = second.column(1).data_page_offset
    content[offset : offset + 20] = bytes([255]) * 20
    Path(whole.path).write_bytes(content)
    with pytest.raises(ToolkitError, match="cannot be read as parquet") as caught:
        build(tmp_path / "train", plan(), whole, num_workers=2)
    assert "\n" not in str(caught.value) and whole.path in str(caught.value)
    assert not multiprocessing.active_children()


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
    said = capsys.readouterr().err
    assert f"{half_bad}:3: " in said and said.count("error: ") == 1
    data_utils.main([*flags, "--train_file", json.dumps([BUNDLED]), "--verify", "true"])
    said = capsys.readouterr().out
    assert "format paragraph" in said and "every sample has its checksum" in said


def test_an_output_dir_that_cannot_be_written_is_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").touch()
    with pytest.raises(
        ToolkitError, match=r"output_dir .*file/output: cannot be written"
    ) as caught:
        data_utils.main(["--output_dir", str(tmp_path / "file" / "output")])
    assert "\n" not in str(caught.value)


def test_blocks_are_cut_in_order_and_hold_every_record(small_blocks):
    blocks = list(cut_blocks([InputFile(BUNDLED, "paragraph"), InputFile(BUNDLED, "paragraph")]))
    assert [block.number for block in blocks] == list(range(len(blocks)))
    assert np.all(np.diff([block.file for block in blocks]) >= 0)
    for file in (0, 1):
        lines = [line for block in blocks if block.file == file for line, _ in block.records()]
        assert lines == list(range(1, len(PARAGRAPHS) + 1))


def test_lines_are_numbered_as_in_the_file_wherever_it_is_cut(tmp_path, monkeypatch):
    lines = [*(json.dumps({"n": n}) for n in range(20)), "", "  ", "{bad", '{"n": 20}']
    path = tmp_path / "data.jsonl"
    for ending in ("", "\n"):
        path.write_bytes(codecs.BOM_UTF8 + "\n".join(lines).encode() + ending.encode())
        for size in (1, 9, 10, 37, 10_000):
            monkeypatch.setattr(shards, "BLOCK_BYTES", size)
            blocks = list(cut_blocks([InputFile(str(path), "paragraph")]))
            found = [record for block in blocks for record in block.records()]
            assert [line for line, _ in found] == [*range(1, 21), 23, 24]
            assert [parse_json(raw)["n"] for line, raw in found if line != 23] == [*range(21)]
