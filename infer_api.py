"""Serve a model to many people at once: the released call, OpenAI's API, and a chat page.

python infer_api.py                                     # ./best_ckpt/last
python infer_api.py --checkpoint /path/to/chatglm-6b --quantization_bit 4
python infer_api.py --checkpoint ./law/last --adapters '{"poems": "./poems/best"}'
"""

import logging
import os
import socket
from collections.abc import Sequence

import uvicorn

from chatglm.command_line import parse_settings, run_script
from chatglm.errors import ToolkitError
from chatglm.serving.api import build_app
from chatglm.serving.keys import read_keys
from chatglm.serving.loading import ServedSettings, check_checkpoint, load_served
from chatglm.serving.settings import ServeSettings

OTHER_CONNECTIONS = 500
"""Open at a time beside those that are answered."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load and serve until SIGTERM or Ctrl-C."""
    groups = [(ServedSettings, {}, "ServedSettings"), (ServeSettings, {}, "ServeSettings")]
    which, serve = parse_settings(groups, argv, description="Serve a model over HTTP.")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    keys = read_keys(serve.api_keys_file, os.environ)
    check_checkpoint(which)
    bound = bind(serve)
    if serve.host not in ("127.0.0.1", "::1", "localhost") and not keys:
        print(f"warning: anybody who reaches {serve.host} can use this server: set api_keys_file")
    config = uvicorn.Config(
        build_app(load_served(which, serve), keys),
        timeout_graceful_shutdown=round(serve.grace_seconds),
        server_header=False,
        proxy_headers=False,  # anybody can send them, and be another client each time
        limit_concurrency=serve.max_running + serve.max_waiting + OTHER_CONNECTIONS,
    )
    uvicorn.Server(config).run(sockets=[bound])


def bind(serve: ServeSettings) -> socket.socket:
    """The address, taken before anything is loaded."""
    kind = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    bound = socket.socket(kind, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((serve.host, serve.port))
    except OSError as error:
        raise ToolkitError(
            f"host {serve.host}, port {serve.port}: can't listen there ({error.strerror}): choose"
            " another --port, or stop what has it"
        ) from None
    return bound


if __name__ == "__main__":
    run_script(main)
