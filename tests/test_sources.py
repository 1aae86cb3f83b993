"""Files of records: every kind gives back what was written; what is broken is named by its line."""

import gzip
import json
import sys
import tracemalloc
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm import sources
from chatglm.errors import ToolkitError
from chatglm.formats import BadRecord
from chatglm.sources import (
    file_format,
    kind_of_file,
    parquet_groups,
    parse_json,
    read_objects,
    read_parquet,
    read_raw,
)

BOM = b"\xef\xbb\xbf"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
numbers = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(texts, values, max_size=4), max_size=8)
tables = st.lists(
    st.fixed_dictionaries({"instruction": texts, "history": st.lists(st.lists(texts, max_size=2))}),
    max_size=8,
)
chunk_sizes = st.integers(1, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a property; each writes its file anew."""
    return tmp_path_factory.mktemp("records")


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        content = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return str(path)

    return write


@pytest.fixture
def write_table(tmp_path):
    def write(rows, **options):
        path = str(tmp_path / "rows.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
        return path

    return write


def read_by_chunks(path, size):
    with mock.patch.object(sources, "CHUNK_BYTES", size):
        return list(read_objects(str(path)))


def refused(path):
    """What was read before the file was given up, and the complaint."""
    read = []
    with pytest.raises(ToolkitError) as caught:
        read.extend(read_objects(path))
    assert "\n" not in str(caught.value) and path in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.json", "json"),
        ("a.json.gz", "json"),
        ("a.jsonl", "jsonl"),
        ("a.jsonl.gz", "jsonl"),
        ("a.parquet", "parquet"),
        ("A.JSON", "json"),
    ],
)
def test_a_file_is_of_the_kind_that_its_name_says(name, kind):
    assert kind_of_file(name) == kind


@pytest.mark.parametrize("name", ["a.csv", "a", "a.gz", "json", "a.parquet.gz", "a.json.zip"])
def test_another_name_is_refused_with_those_that_can_be_read(name):
    with pytest.raises(ToolkitError, match=r"\.jsonl\.gz, \.parquet"):
        kind_of_file(name)
    with pytest.raises(ToolkitError):
        list(read_objects(name))


@given(records, chunk_sizes, st.booleans(), st.sampled_from(["", "\n", "  \r\n", "\ufeff\n"]))
def test_records_come_back_from_lines(folder, records, size, is_ascii, between):
    lines = [json.dumps(record, ensure_ascii=is_ascii) + "\n" + between for record in records]
    step = 2 if between else 1
    for name in ("x.jsonl", "x.json", "x.jsonl.gz", "x.json.gz"):
        content = "".join(lines).encode()
        packed = gzip.compress(content, 1) if name.endswith(".gz") else content
        (folder / name).write_bytes(packed)
        expected = [(1 + step * index, record) for index, record in enumerate(records)]
        assert read_by_chunks(folder / name, size) == expected


@given(records, chunk_sizes, st.booleans(), st.sampled_from([b"", BOM, b"\n \t", BOM + b"\r\n"]))
def test_records_come_back_from_an_array(folder, records, size, is_ascii, before):
    content = before + json.dumps(records, ensure_ascii=is_ascii).encode() + b" \n"
    first = 1 + before.count(b"\n")
    for name, packed in (("x.json", content), ("x.json.gz", gzip.compress(content, 1))):
        (folder / name).write_bytes(packed)
        assert read_by_chunks(folder / name, size) == [(first, record) for record in records]


@given(records, chunk_sizes, st.booleans(), st.sampled_from(["\n", "\r\n"]))
def test_records_come_back_from_an_indented_array(folder, records, size, is_ascii, newline):
    content = json.dumps(records, ensure_ascii=is_ascii, indent=2).replace("\n", newline)
    (folder / "x.json").write_bytes(content.encode())
    line, expected = 2, []
    for record in records:
        expected.append((line, record))
        line += json.dumps(record, indent=2).count("\n") + 1
    assert read_by_chunks(folder / "x.json", size) == expected


@given(tables, st.integers(1, 4), st.integers(1, 3))
def test_records_come_back_from_parquet(folder, rows, group_size, rows_at_once):
    path = str(folder / "x.parquet")
    schema = {
        "instruction": pyarrow.string(),
        "history": pyarrow.list_(pyarrow.list_(pyarrow.string())),
    }
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(schema))
    pyarrow.parquet.write_table(table, path, row_group_size=group_size)
    with mock.patch.object(sources, "ROWS_AT_ONCE", rows_at_once):
        assert list(read_objects(path)) == list(enumerate(rows, start=1))


@given(values, chunk_sizes, st.data())
def test_an_array_cut_off_anywhere_is_refused(folder, value, size, data):
    content = json.dumps([{"x": value}, 12, value]).encode()
    path = folder / "cut.json"
    path.write_bytes(content[: data.draw(st.integers(1, len(content) - 1))])
    with pytest.raises(ToolkitError, match=r"cut\.json:1: not JSON"):
        read_by_chunks(path, size)


@given(st.binary(max_size=40), chunk_sizes, st.sampled_from([b"", b"[", b'[{"x": "']))
def test_any_bytes_give_records_bad_records_or_one_line_of_complaint(folder, content, size, start):
    (folder / "any.json").write_bytes(start + content)
    try:
        read = read_by_chunks(folder / "any.json", size)
    except ToolkitError as error:
        assert "\n" not in str(error)
    else:
        assert all("\n" not in str(got) for _, got in read if isinstance(got, BadRecord))


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b'{"a": ',
        b'{"a": "\xff"}',
        b'{"a": "\\ud800"}',
        b'{"a": NaN}',
        b"[" * 100_000,
        b'{"a": ' + b"1" * 5000 + b"}",
    ],
    ids=["nonsense", "half", "bad UTF-8", "half a pair", "NaN", "too deep", "too many digits"],
)
def test_a_bad_line_costs_that_line_alone(write, name, line):
    (one, good), (three, bad), (four, last) = read_objects(
        write(name, b"{}\n\n" + line + b"\r\n[1]")
    )
    assert (one, good, three, four, last) == (1, {}, 3, 4, [1])
    assert isinstance(bad, BadRecord) and "not a JSON object in UTF-8" in str(bad)
    assert "\n" not in str(bad) and len(str(bad)) < 200


def test_bad_utf8_in_an_element_costs_that_element_alone(write):
    bad = b'{"x": "\xe4\xb8\xff]"}'
    path = write("x.json", b'[{"a": 1},\n' + bad + b",\n" + '{"b": "答"}]'.encode())
    assert list(read_raw(path))[1] == (2, bad)
    (_, first), (_, second), third = read_objects(path)
    assert (first, third) == ({"a": 1}, (3, {"b": "答"}))
    assert isinstance(second, BadRecord)


def test_numbers_of_any_length_do_not_end_an_array(write):
    path = write("x.json", f'[{{"id": {"7" * 5000}}}, NaN, -Infinity, {{"id": 1}}]')
    read = [content for _, content in read_objects(path)]
    assert [isinstance(content, BadRecord) for content in read] == [True] * 3 + [False]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{},\n{"a": 1 2},\n{}]', ":2: not JSON (Expecting ',' delimiter)"),
        ("[{},\n{'a': 1}]", ":2: not JSON (Expecting property name"),
        ('[{},\n{"a":\n "x\ny"}]', ":3: not JSON (Invalid control character at)"),
        ("[{}\n{}]", ":2: not JSON (expected , or ] here)"),
        ("[{},\n,{}]", ":2: not JSON (Expecting value)"),
        ("[{},\n]", ":2: not JSON (Expecting value)"),
        ("[,\n]", ":1: not JSON (Expecting value)"),
        ("[{}\n\n", ":3: not JSON (the file ends inside the array)"),
        ("[\n", ":2: not JSON (the file ends inside the array)"),
        ('[{},\n{"a": "x', ":2: not JSON (Unterminated string"),
        ("[{},\n" + "[" * 100_000, ":2: not JSON (nested too deep)"),
        ('[{}]\n{"a": 1}', ":2: not JSON (something follows the array's ])"),
        ("[]]", ":1: not JSON (something follows the array's ])"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_broken_array_is_refused_at_the_line_where_it_breaks(write, content, reason, size):
    path = write("x.json", content)
    with mock.patch.object(sources, "CHUNK_BYTES", size):
        assert f"{path}{reason}" in refused(path)


def test_a_broken_element_is_refused_without_reading_the_rest(write):
    path = write("x.json", '[{"a": 1 2}' + ',{"a": 1}' * 10_000 + "]")
    with mock.patch.object(sources, "CHUNK_BYTES", 4096), open(path, "rb") as file:
        with pytest.raises(ToolkitError, match="Expecting ',' delimiter"):
            next(sources._Window(file, path).elements())
        assert file.tell() < 10_000


def test_a_file_of_lines_may_begin_with_a_byte_order_mark(write):
    for name in ("x.json", "x.jsonl", "x.json.gz"):
        assert list(read_objects(write(name, BOM + b'{"a": 1}\r\n{}\r\n'))) == [
            (1, {"a": 1}),
            (2, {}),
        ]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz"])
@pytest.mark.parametrize("content", [b"", b"\n\n", BOM, BOM + b" \r\n"])
def test_an_empty_file_holds_no_records(write, name, content):
    assert list(read_objects(write(name, content))) == []


def test_an_array_in_a_jsonl_file_is_a_line_like_others(write):
    assert list(read_objects(write("x.jsonl", '[{"a": 1}]\n{}'))) == [(1, [{"a": 1}]), (2, {})]


def test_parse_json_takes_a_byte_order_mark_and_gives_what_is_there():
    assert parse_json(BOM + '{"答": [1, 2.5, null]}\r\n'.encode()) == {"答": [1, 2.5, None]}
    assert parse_json(b"3") == 3


@pytest.mark.parametrize("name", ["x.json", "x.json.gz", "x.parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path, name):
    path = str(tmp_path / name)
    assert "No such file" in refused(path)
    (tmp_path / name).mkdir()
    refused(path)


def counted_lines(num, indent=""):
    return "".join(f'{indent}{{"id": {i}, "text": "{i**20}"}}\n' for i in range(num))


@pytest.mark.parametrize("is_array", [False, True])
def test_a_truncated_gz_names_the_file_and_the_line_reached(write, tmp_path, is_array):
    lines = counted_lines(20_000)
    content = f"[{lines.strip().replace(chr(10), ',' + chr(10))}]" if is_array else lines
    path = write("x.json.gz", content)
    whole = (tmp_path / "x.json.gz").read_bytes()
    (tmp_path / "x.json.gz").write_bytes(whole[: len(whole) // 2])
    read = []
    with (
        mock.patch.object(sources, "CHUNK_BYTES", 4096),
        pytest.raises(ToolkitError, match="is the file whole") as caught,
    ):
        read.extend(line for line, _ in read_raw(path))
        pytest.fail("it was read to its end")
    reached = int(str(caught.value).split("beyond line ")[1].split()[0])
    assert path in str(caught.value) and 5_000 < reached < 15_000


def test_a_damaged_gz_is_refused(write, tmp_path):
    path = write("x.jsonl.gz", counted_lines(20_000))
    content = bytearray((tmp_path / "x.jsonl.gz").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "x.jsonl.gz").write_bytes(content)
    assert "cannot be read beyond line" in refused(path)
    (tmp_path / "x.jsonl.gz").write_bytes(b"{}\n{}\n")
    assert "cannot be read beyond line 0" in refused(path)


def test_memory_stays_flat_over_an_array_of_20_mb(tmp_path):
    path = tmp_path / "x.json"
    record = json.dumps({"instruction": "问" * 100, "output": "答" * 200}, ensure_ascii=False)
    with path.open("w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join([record] * (20_000_000 // len(record.encode()) + 1)) + "]")
    tracemalloc.start()
    try:
        num = sum(1 for _ in read_raw(str(path)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num * len(record.encode()) >= 20_000_000
    assert peak < 8_000_000


def test_an_element_longer_than_many_chunks_is_read_in_doubling_steps(write):
    path = write("x.json", json.dumps([{"text": "y" * 1_000_000}, {}]))
    decoder = mock.Mock(wraps=sources._DECODER)
    with mock.patch.multiple(sources, CHUNK_BYTES=1024, _DECODER=decoder):
        assert [len(raw) for _, raw in read_raw(path)] == [1_000_012, 2]
    assert decoder.raw_decode.call_count < 16


def test_row_groups_are_read_each_for_itself_with_rows_numbered_over_the_file(write_table):
    rows = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(2500)]
    path = write_table(rows, row_group_size=1200)
    assert parquet_groups(path) == 3
    assert list(read_parquet(path, 1)) == list(enumerate(rows[1200:2400], start=1201))
    assert list(read_parquet(path, 2)) == list(enumerate(rows[2400:], start=2401))


def test_a_broken_parquet_file_is_named(write_table, write):
    assert "cannot be read as parquet" in refused(write("x.parquet", "PAR1 nonsense"))
    assert "cannot be read as parquet" in refused(write("x.parquet", ""))
    path = write_table([{"text": str(i**20)} for i in range(5000)], compression="snappy")
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"\xff" * 2000)
    assert "cannot be read as parquet" in refused(path)


def test_text_in_parquet_that_is_not_utf8_is_named(tmp_path):
    path = str(tmp_path / "x.parquet")
    bad = pyarrow.array([b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), path)
    assert "cannot be read as parquet" in refused(path)


def test_parquet_without_pyarrow_says_what_to_install(write_table, monkeypatch):
    path = write_table([{"text": "x"}])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refused(path)


@pytest.mark.parametrize(
    ("record", "form"),
    [
        ({"id": 0, "paragraph": []}, "paragraph"),
        ({"instruction": "", "output": ""}, "alpaca"),
        ({"conversations": []}, "sharegpt"),
        ({"messages": []}, "openai"),
    ],
)
def test_auto_is_the_format_of_the_first_records(write, record, form):
    lines = f"nonsense\n[]\n{{}}\n{json.dumps(record)}\n"
    assert file_format(write("x.jsonl", lines), "auto") == form
    assert file_format(write("x.json", json.dumps([record])), "auto") == form


def test_a_format_that_was_asked_for_stands_unread():
    assert file_format("absent.json", "openai") == "openai"


def test_only_the_first_hundred_records_are_looked_at(write):
    path = write("x.jsonl", "{}\n" * 100 + '{"messages": []}\n')
    with pytest.raises(ToolkitError, match="no known format"):
        file_format(path, "auto")
    path = write("x.jsonl", "{}\nnonsense\n" * 99 + '{"messages": []}\n')
    assert file_format(path, "auto") == "openai"


def test_no_known_format_names_the_keys_found_and_the_formats(write):
    path = write("x.jsonl", '{"prompt": "x", "response\\n": "y"}\n{"k": 1}\n')
    with pytest.raises(ToolkitError) as caught:
        file_format(path, "auto")
    complaint = str(caught.value)
    assert path in complaint and "\n" not in complaint
    assert "'prompt', 'response\\n', 'k'" in complaint
    for known in ("paragraph", "alpaca", '"instruction"', "sharegpt", '"conversations"', "openai"):
        assert known in complaint
    with pytest.raises(ToolkitError, match="no JSON object"):
        file_format(write("y.jsonl", "nonsense\n"), "auto")


def test_two_formats_in_one_file_are_refused_by_auto(write):
    path = write("x.jsonl", '{"messages": []}\n{"conversations": []}\n')
    with pytest.raises(ToolkitError, match=r"openai, sharegpt.*a file for each"):
        file_format(path, "auto")
