"""Convert files of alpaca records, or of another known format, to question/answer paragraphs.

python data/alpaca2qa.py my_alpaca.json --out data/alpaca_qa.json
python data/alpaca2qa.py a.jsonl.gz b.parquet --out data/mine_qa.json --format auto

One paragraph a line is written, with running ids. Records that hold nothing to learn from are
left out and counted; the first of them are named. The formats are those of chatglm/formats.py.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from chatglm.command_line import run_script  # noqa: E402
from chatglm.corpus import read_rounds  # noqa: E402
from chatglm.errors import ToolkitError  # noqa: E402
from chatglm.files import written_aside  # noqa: E402
from chatglm.formats import FORMATS, BadRecord, Rounds  # noqa: E402
from chatglm.sources import kind_of_file  # noqa: E402

BAD_RECORDS_NAMED = 5


class Parser(argparse.ArgumentParser):
    """argparse with its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        """End with what is wrong and where the rest is said."""
        raise ToolkitError(f"{message}; see python data/alpaca2qa.py --help")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The files to read, the file to write and the format."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", metavar="IN", help=".json, .jsonl, .gz or .parquet")
    parser.add_argument("--out", required=True, help="JSON-lines file to write")
    parser.add_argument(
        "--format",
        default="alpaca",
        choices=["auto", *FORMATS],
        help="of the records (default: alpaca); auto: by the keys of each file's first ones",
    )
    return parser.parse_args(argv)


def as_paragraph(rounds: Rounds, number: int) -> str:
    """The line that holds the rounds."""
    paragraph = [{"q": question, "a": answer} for question, answer in rounds]
    return json.dumps({"id": number, "paragraph": paragraph}, ensure_ascii=False) + "\n"


def convert(inputs: Sequence[str], out: str, wanted: str) -> tuple[int, list[str], int]:
    """How many paragraphs were written, the first bad records, and how many there are of those."""
    number, named, num_bad = 0, [], 0
    with written_aside(out) as file:
        for path in inputs:
            for line, rounds in read_rounds(path, wanted):
                if isinstance(rounds, BadRecord):
                    num_bad += 1
                    named += [f"{path}:{line}: {rounds}"] if num_bad <= BAD_RECORDS_NAMED else []
                else:
                    file.write(as_paragraph(rounds, number))
                    number += 1
        if not number:
            first = f"the first of {num_bad}: {named[0]}" if named else "no records there"
            raise ToolkitError(f"{', '.join(inputs)}: nothing to convert as {wanted} ({first})")
    return number, named, num_bad


def main(argv: Sequence[str] | None = None) -> None:
    """Convert, and say what was left out."""
    arguments = parse_arguments(argv)
    for path in arguments.inputs:
        kind_of_file(path)
        if os.path.realpath(path) == os.path.realpath(arguments.out):
            raise ToolkitError(f"--out {arguments.out}: is one of the files to read; name another")
    number, named, num_bad = convert(arguments.inputs, arguments.out, arguments.format)
    if num_bad:
        more = f", the first {len(named)}" if num_bad > len(named) else ""
        print(f"left out {num_bad} bad records{more}:", *named, sep="\n  ", file=sys.stderr)
    print(f"wrote {number} paragraphs to {arguments.out}")


if __name__ == "__main__":
    run_script(main)
