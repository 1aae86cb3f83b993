"""What the READMEs promise: files, flags and commands."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from .test_api import is_ready, wait_until

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_zh.md")
MORE_SCRIPTS = (
    "infer_lora_finetuning.py", "infer_api.py", "evaluate.py", "convert_checkpoint.py",
    "data_utils.py", "data/alpaca2qa.py",
)  # fmt: skip
SET_UP = ("make", "python3 -m venv", ".venv/bin/pip", ".venv/bin/python -m pytest")


def blocks(name, language):
    text = ROOT.joinpath(name).read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [block for kind, block in found if kind == language]


def commands(name):
    return [line for block in blocks(name, "bash") for line in block.splitlines() if line]


@pytest.mark.parametrize("name", READMES)
def test_every_file_of_the_map_exists_and_every_script_is_in_it(name):
    text = ROOT.joinpath(name).read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE))
    assert all(ROOT.joinpath(path).exists() for path in listed if not path.startswith("--"))
    assert {path.name for path in ROOT.glob("*.py")} <= listed


def test_both_readmes_have_the_same_code():
    for language in ("bash", "python", "json", ""):
        english, chinese = (
            [re.sub(r"#.*", "", block) for block in blocks(name, language)] for name in READMES
        )
        assert english == chinese


def test_every_flag_named_in_the_readmes_exists(monkeypatch, capsys):
    text = "".join(ROOT.joinpath(name).read_text(encoding="utf-8") for name in READMES)
    monkeypatch.chdir(ROOT)
    for script in ("train.py", "infer.py", "infer_finetuning.py", *MORE_SCRIPTS):
        monkeypatch.setattr(sys, "argv", [script, "--help"])
        with pytest.raises(SystemExit) as end:  # in this process, which has all imports
            runpy.run_path(script, run_name="__main__")
        assert not end.value.code
    helps = capsys.readouterr().out
    for flag in set(re.findall(r"--[a-z][a-z_]+", text)):
        assert flag in helps, flag


def test_the_road_of_the_readme_ends_in_the_right_answers(tmp_path):
    """Runs the README's commands in order on a copy of the tree, the demo included."""
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for path in tracked:
        if not path.startswith("tests/"):
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(ROOT.joinpath(path).read_bytes())
    outputs = {}
    for line in commands("README.md"):
        if not line.startswith(SET_UP):
            command = line.replace("/tmp/", f"{tmp_path}/")
            command = command.replace(".venv/bin/python", shlex.quote(sys.executable))
            done = subprocess.run(
                command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False,
                env={**os.environ, "OMP_NUM_THREADS": "1"},  # other tests have the other cores
            )  # fmt: skip
            assert done.returncode == 0, (line, done.stderr[-2000:])
            outputs[line] = done.stdout
    route = next(text for line, text in outputs.items() if "从南京到上海的路线" in line)
    assert "1. 坐高铁：从南京南站" in route
    assert "2. 自驾：走G42沪蓉高速" in route
    check_the_server(tmp_path)
    rounds = next(text for line, text in outputs.items() if line.startswith("printf"))
    assert "答：南京最有名的小吃有盐水鸭、鸭血粉丝汤和小笼包" in rounds
    assert "答：盐水鸭先用炒热的花椒盐" in rounds


def check_the_server(folder):
    """The section about serving: its commands, and its Python."""
    address = "http://127.0.0.1:56780"
    block = next(block for block in blocks("README.md", "") if "infer_api.py" in block)
    started, *calls = block.replace(".venv/bin/python", shlex.quote(sys.executable)).splitlines()
    code = next(block for block in blocks("README.md", "python") if "openai" in block)
    with open(folder / "server.log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(
            shlex.split(started), cwd=folder, stdout=log, stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        # Seconds; but another test has the other core, and one that needs many.
        wait_until(lambda: server.poll() is not None or is_ready(address), seconds=300)
        assert server.poll() is None
        for call in calls:
            done = subprocess.run(call, shell=True, capture_output=True, text=True, check=True)
            assert "1. 坐高铁：从南京南站" in done.stdout or "data: [DONE]" in done.stdout
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.startswith("南京最有名的小吃有盐水鸭")
    finally:
        server.terminate()
        server.wait(30)
        print((folder / "server.log").read_text())  # shown if the test fails
