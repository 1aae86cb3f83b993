"""data/alpaca2qa.py: what it writes, leaves out and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chatglm.corpus import read_paragraphs

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "data" / "alpaca2qa.py"
ALPACA = ROOT.parent / "shared" / "data" / "alpaca_zh_0-3252.json"


@pytest.fixture
def convert(tmp_path):
    def convert(*arguments):
        """Run from a folder that isn't the repository."""
        return subprocess.run(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )

    return convert


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def record(question, answer="答", **more):
    return {"instruction": question, "output": answer, **more}


def test_several_files_become_paragraphs_with_running_ids(convert, tmp_path):
    first = write(
        tmp_path / "a.jsonl", record("一", input="句"), record("二", history=[["三", "四"]])
    )
    (tmp_path / "b.json").write_text(json.dumps([record("五", "六\n七")], indent=2))
    done = convert(first, "b.json", "--out", "new/qa.json")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "wrote 3 paragraphs to new/qa.json\n"
    lines = (tmp_path / "new" / "qa.json").read_text(encoding="utf-8").splitlines()
    assert lines[0] == '{"id": 0, "paragraph": [{"q": "一\\n句", "a": "答"}]}'
    assert [json.loads(line)["id"] for line in lines] == [0, 1, 2]
    rounds = list(read_paragraphs([str(tmp_path / "new" / "qa.json")]))
    assert rounds[1:] == [[("三", "四"), ("二", "答")], [("五", "六\n七")]]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["qa.json"]


def test_each_file_may_have_its_own_format(convert, tmp_path):
    write(tmp_path / "a.json", record("一"))
    said = [{"role": "user", "content": "二"}, {"role": "assistant", "content": "答"}]
    write(tmp_path / "b.json", {"messages": said})
    done = convert("a.json", "b.json", "--out", "qa.json", "--format", "auto")
    assert done.returncode == 0, done.stderr
    rounds = list(read_paragraphs([str(tmp_path / "qa.json")]))
    assert rounds == [[("一", "答")], [("二", "答")]]


def test_bad_records_are_counted_and_the_first_five_named(convert, tmp_path):
    path = write(tmp_path / "a.json", record("一"), *[record("二", "")] * 6)
    path.write_text(path.read_text() + "nonsense\n")
    done = convert("a.json", "--out", "qa.json")
    assert done.returncode == 0
    head, *named = done.stderr.splitlines()
    assert head == "left out 7 bad records, the first 5:"
    assert [line.strip() for line in named] == [
        f'a.json:{number}: "output" is empty' for number in range(2, 7)
    ]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["empty.json", "--out", "qa.json"], "nothing to convert as alpaca (no records there)"),
        (["other.json", "--out", "qa.json"], "the first of 1: other.json:1: expected"),
        (["other.json", "--out", "qa.json", "--format", "auto"], "no known format"),
        (["good.json", "absent.json", "--out", "qa.json"], "absent.json: cannot be read"),
        (["good.csv", "--out", "qa.json"], "good.csv: the name must end in one of"),
        (["good.json", "--out", "./good.json"], "is one of the files to read"),
        (["good.json", "--out", "."], "a folder"),
        (["good.json"], "--out"),
        (["good.json", "--out", "qa.json", "--format", "csv"], "sharegpt"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_no_file(
    convert, tmp_path, arguments, reason
):
    write(tmp_path / "empty.json")
    write(tmp_path / "other.json", {"prompt": "x"})
    write(tmp_path / "good.json", record("一"))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = convert(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert reason in done.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not ALPACA.exists(), reason=f"{ALPACA} is not there")
def test_alpaca_gpt4_data_zh_loses_only_its_records_without_an_output(convert, tmp_path):
    done = convert(ALPACA, "--out", "qa.json")
    assert done.returncode == 0
    records = json.loads(ALPACA.read_text(encoding="utf-8"))
    rounds = list(read_paragraphs([str(tmp_path / "qa.json")]))
    answered = [one["output"] for one in records if one["output"].strip()]
    assert [answer for ((_, answer),) in rounds] == answered
    left_out = [line.split(": ", 1)[1] for line in done.stderr.splitlines()[1:]]
    assert left_out == ['"output" is empty'] * (len(records) - len(answered))
