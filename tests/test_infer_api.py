"""The server as a process: its start, its end, and what is said on the way."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import infer_api
from chatglm.errors import ToolkitError

from .processes import free_port
from .test_api import is_ready, wait_until
from .tiny_weights import write_weights

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_weights(tmp_path_factory.mktemp("served"), std=0.36))


@contextlib.contextmanager
def process(folder, port, log, **flags):
    """(process, address) of a server that is ready."""
    argv = [sys.executable, "infer_api.py", f"--checkpoint={folder}", f"--port={port}",
            "--device=cpu", *(f"--{name}={value}" for name, value in flags.items())]  # fmt: skip
    with open(log, "ab") as file:
        started = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=file,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_ready(address) or started.poll() is not None, seconds=300)
        assert started.poll() is None, Path(log).read_text()
        yield started, address
    finally:
        started.kill()
        started.wait()


def test_sigterm_lets_a_running_answer_end_and_takes_no_new_one(folder, tmp_path):
    body = {"messages": [{"role": "user", "content": "三上"}], "stream": True, "n": 16, "seed": 1}
    with (
        process(folder, free_port(), tmp_path / "log") as (server, address),
        httpx.stream("POST", f"{address}/v1/chat/completions", json=body, timeout=30) as stream,
    ):
        lines = stream.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        events = [line.removeprefix("data: ") for line in lines if line]
        assert events[-1] == "[DONE]"
        reasons = [json.loads(event)["choices"][0]["finish_reason"] for event in events[:-1]]
        assert len([reason for reason in reasons if reason]) == 16
        server.wait(20)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{address}/health")
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and "serving chatglm-6b: up to 32 answers" in log


def test_a_killed_server_starts_again_on_its_port(folder, tmp_path):
    port = free_port()
    for _ in range(2):
        with process(folder, port, tmp_path / "log") as (server, address):
            answer = httpx.post(f"{address}/", json={"prompt": "三上", "max_length": 12})
            assert answer.json()["status"] == 200
            server.send_signal(signal.SIGKILL)
            server.wait(20)


def test_a_taken_port_and_a_missing_checkpoint_are_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ToolkitError, match=f"port {port}: can't listen there .* --port"):
            infer_api.main([f"--port={port}", f"--checkpoint={tmp_path}"])
    with pytest.raises(ToolkitError, match="nowhere"):
        infer_api.main(["--port=0", f"--checkpoint={tmp_path}/nowhere"])


def test_limits_out_of_range_are_refused():
    with pytest.raises(ToolkitError, match="max_running 0: allowed is 1 and above"):
        infer_api.main(["--max_running=0"])
    with pytest.raises(ToolkitError, match="port 70000"):
        infer_api.main(["--port=70000"])
