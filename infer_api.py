"""Serve a model to many people at once: the released call, OpenAI's API, and a chat page.

python infer_api.py                                     # ./best_ckpt/last
python infer_api.py --checkpoint /path/to/chatglm-6b --quantization_bit 4
python infer_api.py --checkpoint ./law/last --adapters '{"poems": "./poems/best"}'
"""

import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import uvicorn

from chatglm.command_line import parse_settings, run_script
from chatglm.errors import ToolkitError
from chatglm.serving.api import build_app
from chatglm.serving.keys import read_keys
from chatglm.serving.served import Served
from chatglm.settings import ServeSettings
from models import load_for_inference


@dataclass(frozen=True)
class ServedSettings:
    """Which weights are served."""

    checkpoint: str = "./best_ckpt/last"
    """Whatever can be talked to: weights, a hub name, or what train.py saved by any method."""
    model_name_or_path: str = ""
    """The weights under an adapter or a prefix encoder; empty: those it was trained on."""
    adapters: dict[str, str] = field(default_factory=dict)
    """More adapters by name, each a model of its own in requests."""
    quantization_bit: Literal[0, 4, 8] = 0
    """Quantise fp16 weights the released way while loading; 0: as stored, or as in the training."""
    inference_precision: Literal["auto", "32", "bf16", "16"] = "auto"
    """Of the weights; auto: as stored on a GPU; on a CPU 32, over large int8 and int4 bf16."""
    device: str = "auto"
    """cuda, cuda:1, mps or cpu; auto: the GPU if there is one."""


def main(argv: Sequence[str] | None = None) -> None:
    """Load and serve until SIGTERM or Ctrl-C."""
    groups = [(ServedSettings, {}, "ServedSettings"), (ServeSettings, {}, "ServeSettings")]
    which, serve = parse_settings(groups, argv, description="Serve a model over HTTP.")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.INFO)
    keys = read_keys(serve.api_keys_file, os.environ)
    bound = bind(serve)
    if serve.host not in ("127.0.0.1", "::1", "localhost") and not keys:
        print(f"warning: anybody who reaches {serve.host} can use this server: set api_keys_file")
    config = uvicorn.Config(
        build_app(load(which, serve), keys),
        timeout_graceful_shutdown=round(serve.grace_seconds),
        server_header=False,
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


def load(which: ServedSettings, serve: ServeSettings) -> Served:
    """The model, under its names."""
    if which.checkpoint == ServedSettings.checkpoint and not os.path.isdir(which.checkpoint):
        raise ToolkitError(
            f"{which.checkpoint} is not there yet: train the tiny model first (python train.py), or"
            " give --checkpoint"
        )
    model, tokenizer = load_for_inference(
        which.checkpoint,
        precision=which.inference_precision,
        device=which.device,
        base=which.model_name_or_path,
        adapters=which.adapters,
        quantization_bit=which.quantization_bit,
    )
    served = Served(model, tokenizer, serve)
    print(served.describe())
    return served


if __name__ == "__main__":
    run_script(main)
