"""Record files: what goes in comes out, and damage and change are noticed."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatglm.errors import ToolkitError
from chatglm.records import (
    RecordFile,
    manifest_path,
    read_manifest,
    reason_to_rebuild,
    write_records,
)
from chatglm.strategies import Sample

SAMPLES = [Sample([5, 6, 7, 8, 9][:n], 2) for n in (5, 3, 4)]
SOURCE = {"data": {"f": "1"}, "tokenizer": "t", "template": "v1", "max_seq_length": 8,
          "strategy": ["truncation", 1], "strategy version": 1}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "deep" / "train.record")
    write_records(path, SAMPLES, SOURCE)
    return path


def contents(path):
    records = RecordFile(path)
    return [records[index] for index in range(len(records))]


ids = st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=50)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ids, min_size=1, max_size=8))
def test_samples_come_back_in_their_order(tmp_path, rows):
    samples = [Sample(row, 1 + number % 2) for number, row in enumerate(rows)]
    path = str(tmp_path / "any.record")
    write_records(path, samples, {})
    assert contents(path) == samples


def test_the_manifest_says_source_counts_and_size(path):
    manifest = read_manifest(path)
    assert manifest["source"] == SOURCE
    assert manifest["bytes"] == Path(path).stat().st_size
    counts = manifest["counts"]
    assert (counts["samples"], counts["tokens"], counts["longest"]) == (3, 12, 5)
    assert counts["learned_tokens"] == 12 - 3 * 3


def test_records_of_the_same_source_are_used_again(path):
    assert reason_to_rebuild(path, json.loads(json.dumps(SOURCE))) is None


@pytest.mark.parametrize("key", SOURCE)
def test_whatever_changed_is_the_reason_to_rebuild(path, key):
    assert reason_to_rebuild(path, {**SOURCE, key: "other"}) == f"{key} changed"


def test_missing_and_odd_files_are_reasons_to_rebuild(path):
    assert reason_to_rebuild(f"{path}.absent", SOURCE) == "not built yet"
    with open(path, "ab") as file:
        file.write(b"x")
    assert reason_to_rebuild(path, SOURCE) == "the file was changed"
    for odd in ("{", "[]", "{}"):
        Path(manifest_path(path)).write_text(odd)
        assert "manifest" in reason_to_rebuild(path, SOURCE)
    Path(manifest_path(path)).unlink()
    assert reason_to_rebuild(path, SOURCE) == "not built yet"


def test_a_flipped_byte_in_a_record_is_a_toolkit_error_naming_it(path):
    whole = Path(path).read_bytes()
    start = 12 + 24 + 4 + 12  # the second record's data: length, CRC, data, CRC; length, CRC
    for offset in range(start, start + 16):
        content = bytearray(whole)
        content[offset] ^= 1
        Path(path).write_bytes(content)
        records = RecordFile(path)
        assert records[0] == SAMPLES[0] and records[2] == SAMPLES[2]
        with pytest.raises(ToolkitError, match="record 1"):
            records[1]


def test_a_flipped_byte_anywhere_is_a_toolkit_error(path):
    whole = Path(path).read_bytes()
    for offset in range(len(whole)):
        content = bytearray(whole)
        content[offset] ^= 1
        Path(path).write_bytes(content)
        with pytest.raises(ToolkitError):
            contents(path)


def test_a_file_cut_short_anywhere_is_a_toolkit_error(path):
    whole = Path(path).read_bytes()
    for length in range(len(whole)):
        Path(path).write_bytes(whole[:length])
        with pytest.raises(ToolkitError):
            contents(path)


def test_an_interrupted_write_leaves_the_old_file(path):
    def interrupted():
        yield Sample([1, 2, 3], 1)
        raise RuntimeError("interrupted")

    before = [Path(p).read_bytes() for p in (path, manifest_path(path))]
    with pytest.raises(RuntimeError, match="interrupted"):
        write_records(path, interrupted(), {**SOURCE, "tokenizer": "new"})
    assert [Path(p).read_bytes() for p in (path, manifest_path(path))] == before
    assert contents(path) == SAMPLES and reason_to_rebuild(path, SOURCE) is None


def test_a_missing_file_says_how_to_build_it(tmp_path):
    with pytest.raises(ToolkitError, match=r"absent\.record.*data_utils\.py"):
        RecordFile(str(tmp_path / "absent.record"))
