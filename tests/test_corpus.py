"""Paragraph files: what is read, and what is refused with file and line."""

import json

import pytest

import data_utils
from chatglm.corpus import count_files, expand_files, read_paragraphs
from chatglm.errors import ToolkitError

GOOD = '{"paragraph": [{"q": "问", "a": "答"}]}'


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "lines.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b'{"paragraph": ',
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b"{}",
        b'{"paragraph": []}',
        b'{"paragraph": {}}',
        b'{"paragraph": "q"}',
        b'{"paragraph": [1]}',
        b'{"paragraph": [{"q": "x"}]}',
        b'{"paragraph": [{"a": "x"}]}',
        b'{"paragraph": [{"q": 1, "a": "x"}]}',
        b'{"paragraph": [{"q": "x", "a": 1}]}',
        b'{"paragraph": [{"q": ["x", 2], "a": "x"}]}',
        b'{"paragraph": [{"q": "x", "a": ["y", 1]}]}',
        b'{"paragraph": [{"q": "x", "a": []}]}',
        b'{"paragraph": [{"q": "x", "a": null}]}',
        b'{"paragraph": [{"q": " ", "a": "x"}]}',
        b'{"paragraph": [{"q": "x", "a": "\\n"}]}',
        b'{"paragraph": [{"q": "x", "a": "y"}, {"q": ""}]}',
    ],
)
def test_a_bad_line_is_a_toolkit_error_naming_file_and_line(write, line):
    path = write(GOOD.encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ToolkitError) as caught:
        list(read_paragraphs([path]))
    assert f"{path}:3:" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        '{"id": ' + "1" * 5000 + "}",
        "[" * 100_000,
        '{"paragraph": [{"q": "\\ud800", "a": "x"}]}',
    ],
    ids=["too many digits", "too deep", "half a surrogate pair"],
)
def test_a_line_that_json_or_utf8_cannot_hold_names_file_and_line(write, line):
    path = write(f"{GOOD}\n{line}\n")
    with pytest.raises(ToolkitError) as caught:
        list(read_paragraphs([path]))
    assert f"{path}:2:" in str(caught.value)


def test_the_second_round_is_named_when_it_is_bad(write):
    path = write('{"paragraph": [{"q": "x", "a": "y"}, {"q": "x"}]}')
    with pytest.raises(ToolkitError, match="round 1"):
        list(read_paragraphs([path]))


def test_the_lines_of_a_list_answer_are_joined_by_newline(write):
    path = write('{"paragraph": [{"q": "x", "a": ["一", "", "二"]}]}')
    assert list(read_paragraphs([path])) == [[("x", "一\n\n二")]]


def test_a_byte_order_mark_and_blank_lines_are_read_over(write):
    path = write(f"\ufeff{GOOD}\r\n\n  \n{GOOD}")
    assert list(read_paragraphs([path])) == [[("问", "答")]] * 2


def test_a_byte_order_mark_may_stand_alone_in_its_line(write):
    assert list(read_paragraphs([write(f"\ufeff\n{GOOD}")])) == [[("问", "答")]]


def test_files_are_named_or_globbed_in_sorted_order(tmp_path):
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).write_text(GOOD)
    found = expand_files([f"{tmp_path}/*.json", f"{tmp_path}/c.txt"])
    assert [path[-6:] for path in found] == ["a.json", "b.json", "/c.txt"]


def test_a_pattern_without_files_is_refused_by_name(tmp_path):
    with pytest.raises(ToolkitError, match="absent"):
        expand_files([f"{tmp_path}/absent*.json"])


def test_the_files_of_each_entry_are_counted(tmp_path):
    for name in ("b.json", "a.json", "c.txt"):
        (tmp_path / name).write_text(GOOD)
    assert count_files([f"{tmp_path}/*.json", f"{tmp_path}/c.txt"]) == [2, 1]


def test_a_file_that_two_entries_match_is_refused_by_name_however_it_is_called(tmp_path):
    (tmp_path / "a.json").write_text(GOOD)
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    plain = f"{tmp_path}/a.json"
    for other in (plain, f"{tmp_path}/../{tmp_path.name}/a.json", f"{tmp_path}/link.json"):
        with pytest.raises(ToolkitError, match=r"\.json is matched by two entries of train_file"):
            count_files([plain, other])
    with pytest.raises(ToolkitError, match=rf"{plain} is matched by .*, {plain} and .*\*\.json:"):
        count_files([plain, f"{tmp_path}/*.json"])


def test_a_folder_in_the_place_of_a_file_is_a_toolkit_error(tmp_path):
    with pytest.raises(ToolkitError):
        list(read_paragraphs(expand_files([str(tmp_path)])))


def test_the_bundled_files_are_as_promised(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)
    train = list(read_paragraphs(expand_files(data_utils.train_info_args["train_file"])))
    dev = list(read_paragraphs(expand_files(data_utils.train_info_args["eval_file"])))
    assert len(train) >= 100 and dev
    assert sum(len(rounds) > 1 for rounds in train) >= len(train) / 5
    first = [rounds[0][0] for rounds in train[:3]]
    assert first == ["从南京到上海的路线", "写一首关于冬天的诗", "晚上睡不着应该怎么办"]
    assert not {q for r in dev for q, _ in r[:1]} & {q for r in train for q, _ in r[:1]}


def test_the_bundled_files_are_one_json_object_a_line(request):
    for path in (request.config.rootpath / "data").glob("finetune_*.json"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert set(json.loads(line)) == {"id", "paragraph"}
