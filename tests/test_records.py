"""Records: what goes in comes out, and every kind of damage is noticed."""

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import tfrecords
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chatglm.errors import ToolkitError
from chatglm.records import SUFFIXES, Counts, RecordFolder, read_manifest
from chatglm.strategies import Sample

from .tiny_records import write_folder

SAMPLES = [Sample([5, 6, 7, 8, 9][:n], 2) for n in (5, 3, 4)]
BACKENDS = tuple(SUFFIXES)
PLAIN = tfrecords.TFRecordOptions(compression_type=tfrecords.TFRecordCompressionType.NONE)

ids = st.lists(st.integers(0, 2**31 - 1), min_size=3, max_size=50)


@pytest.fixture(params=BACKENDS)
def folder(request, tmp_path):
    return write_folder(tmp_path / "train", SAMPLES, backend=request.param)


def shard_of(folder):
    return Path(folder) / read_manifest(folder)["shards"][0]["name"]


def contents(folder):
    found = RecordFolder(folder)
    return [found[number] for number in range(len(found))]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.lists(ids, min_size=1, max_size=5), min_size=1, max_size=4))
def test_samples_come_back_in_their_order_over_all_shards(tmp_path_factory, backend, rows):
    shards = [[Sample(one, 1 + len(one) % 2) for one in shard] for shard in rows]
    folder = write_folder(tmp_path_factory.mktemp("any"), *shards, backend=backend)
    everything = [sample for shard in shards for sample in shard]
    assert contents(folder) == everything
    found = RecordFolder(folder)
    assert [found[n] for n in reversed(range(len(found)))] == everything[::-1]
    assert list(found.verify()) == list(range(len(everything)))
    assert found.index["file"].tolist() == [n for n, shard in enumerate(rows) for _ in shard]


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_shards_than_files_may_be_open_are_read(tmp_path, backend):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shards = [SAMPLES[:1]] * 150
    folder = write_folder(tmp_path / "train", *shards, backend=backend)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 50, hard))
    try:
        assert contents(folder) == SAMPLES[:1] * 150
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_lengths_are_known_without_reading(folder):
    tokens, learned = RecordFolder(folder).lengths()
    assert tokens.tolist() == [5, 3, 4] and learned.tolist() == [2, 0, 1]


@pytest.mark.parametrize("number", [-1, 3, 100])
def test_a_number_beyond_the_samples_is_an_index_error(folder, number):
    with pytest.raises(IndexError):
        RecordFolder(folder)[number]


def test_the_tfrecords_package_reads_what_is_written(tmp_path):
    path = shard_of(write_folder(tmp_path / "train", SAMPLES))
    rows = [np.frombuffer(data, "<i4").tolist()
            for data in tfrecords.tf_record_iterator(str(path), options=PLAIN)]  # fmt: skip
    assert rows == [[2, *sample.input_ids.tolist()] for sample in SAMPLES]


def test_the_tfrecords_package_writes_the_same_bytes(tmp_path):
    path = shard_of(write_folder(tmp_path / "train", SAMPLES))
    theirs = tmp_path / "theirs"
    with tfrecords.TFRecordWriter(str(theirs), options=PLAIN) as writer:
        for sample in SAMPLES:
            writer.write(np.array([2, *sample.input_ids], dtype="<i4").tobytes())
    assert path.read_bytes() == theirs.read_bytes()


def test_a_flipped_byte_names_shard_and_offset_and_spares_the_other_samples(tmp_path):
    folder = write_folder(tmp_path / "train", SAMPLES)
    path = shard_of(folder)
    whole, second = path.read_bytes(), 12 + 24 + 4
    for offset in range(second, second + 12 + 16 + 4):
        content = bytearray(whole)
        content[offset] ^= 1
        path.write_bytes(content)
        found = RecordFolder(folder)
        assert found[0] == SAMPLES[0] and found[2] == SAMPLES[2]
        with pytest.raises(ToolkitError, match=rf"00000\.record: sample 1 at {second} is damaged"):
            found[1]


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_a_flipped_bit_of_lmdb_is_noticed_before_lmdb_reads_it(tmp_path, bit):
    folder = write_folder(tmp_path / "train", SAMPLES, backend="lmdb")
    path = shard_of(folder)
    whole = path.read_bytes()
    for offset in range(bit, len(whole), 11):
        content = bytearray(whole)
        content[offset] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(ToolkitError, match=r"00000\.lmdb: damaged"):
            contents(folder)


def test_a_damaged_entry_of_lmdb_names_its_number(tmp_path, monkeypatch):
    samples = [Sample([number, 6, 7], 1) for number in range(3)]
    folder = write_folder(tmp_path / "train", samples, backend="lmdb")
    path = shard_of(folder)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(samples[1].input_ids.tobytes(), bytes(12)))
    monkeypatch.setattr(RecordFolder, "_check_crc", lambda *_: None)
    found = RecordFolder(folder)
    assert found[0] == samples[0]
    with pytest.raises(ToolkitError, match=r"00000\.lmdb: sample 1 at 1 is damaged"):
        list(found.verify())


def test_a_flipped_bit_of_the_index_is_refused_at_opening(folder):
    path = Path(folder) / "index.npy"
    whole = path.read_bytes()
    for offset in range(len(whole)):
        content = bytearray(whole)
        content[offset] ^= 1 << offset % 8
        path.write_bytes(content)
        with pytest.raises(ToolkitError, match=r"index\.npy: damaged"):
            RecordFolder(folder)


def test_a_shard_cut_short_after_opening_is_a_toolkit_error(folder):
    path = shard_of(folder)
    whole = path.read_bytes()
    for length in range(0, len(whole), 1 + len(whole) // 50):
        path.write_bytes(whole)
        found = RecordFolder(folder)
        path.write_bytes(whole[:length])
        with pytest.raises(ToolkitError, match=path.name):
            list(found.verify())


def test_a_shard_cut_short_anywhere_is_refused_at_opening(folder):
    path = shard_of(folder)
    whole = path.read_bytes()
    for length in range(0, len(whole), 1 + len(whole) // 100):
        path.write_bytes(whole[:length])
        with pytest.raises(ToolkitError, match=f"{path.name}: {length:,} bytes of {len(whole):,}"):
            RecordFolder(folder)


@pytest.mark.parametrize("name", ["00000.record", "index.npy", "manifest.json"])
def test_a_missing_file_says_how_to_build_anew(tmp_path, name):
    folder = write_folder(tmp_path / "train", SAMPLES)
    (Path(folder) / name).unlink()
    with pytest.raises(ToolkitError, match=r"python data_utils\.py"):
        RecordFolder(folder)


@pytest.mark.parametrize("odd", ["{", "[]", "{}", '{"source": {}}'])
def test_an_odd_manifest_is_a_toolkit_error(tmp_path, odd):
    folder = write_folder(tmp_path / "train", SAMPLES)
    (Path(folder) / "manifest.json").write_text(odd)
    with pytest.raises(ToolkitError, match=r"manifest\.json"):
        RecordFolder(folder)


def test_counts_of_shards_add_up_and_survive_json(tmp_path):
    cut = Sample([1, 2, 3, 4], 1, prompt_cut=True, answer_cut=True, window=1)
    parts = [write_folder(tmp_path / str(n), s) for n, s in enumerate((SAMPLES, [cut, cut]))]
    together = read_manifest(write_folder(tmp_path / "all", SAMPLES, [cut, cut]))["counts"]
    total = Counts()
    for part in parts:
        counts = Counts.from_json(json.loads(json.dumps(read_manifest(part)["counts"])))
        total.merge(counts)
    assert json.loads(json.dumps(total.as_json())) == together
    assert (total.samples, total.tokens, total.longest) == (5, 20, 5)
    assert total.learned_tokens == 3 + 2 * 2
    assert (total.prompts_cut, total.answers_cut, total.rounds_in_windows) == (2, 2, 2)
    assert total.lengths == {3: 1, 4: 3, 5: 1}
