"""The same application in several processes, on one machine or a cluster, under Ray Serve.

    serve run chatglm.serving.ray_app:build checkpoint=./best_ckpt/last num_replicas=2

Each replica loads the model and runs an engine of its own; Ray's proxies listen (on port 8000,
unless `serve start --http-port` came first), and give a request to the less busy of two replicas.
What counts requests counts those of one replica: a client's limit, the queue, and /metrics. In a
config file of Ray's the same names stand under `args`, and `deployments` may set what Ray alone
knows, such as autoscaling, for the deployment "ChatGLM". On a cluster every machine must see the
checkpoint under the same path; `--working-dir .` gives it the code.
"""

import asyncio
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI
from ray import serve

from ..command_line import parse_settings
from ..errors import ToolkitError
from ..settings import at_least
from .api import build_app
from .keys import read_keys
from .loading import ServedSettings, check_checkpoint, load_served
from .settings import ServeSettings

PLACES_BESIDE = 32
"""Of a replica's requests, beside those that its engine runs and lets wait: it is the engine that
says that it is full, and the calls that ask for no answer still come through."""
READY_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class RaySettings:
    """How many processes serve, and what of the cluster is each one's."""

    num_replicas: int = 1
    """Processes, each with the model and an engine of its own."""
    num_cpus: float = 1.0
    """Cores of each, as Ray counts them; without a GPU it computes in so many threads."""
    num_gpus: float | None = None
    """GPUs of each; null: one, but none for device cpu or where this machine has none. With 0.5 two
    share a GPU: set kv_cache_tokens then, since the first would take half of what is free."""

    def __post_init__(self):
        at_least(self, 1, "num_replicas")
        at_least(self, 0, "num_cpus", "num_gpus")


class ChatGLM:
    """What Ray asks of a replica beside its application, which `serve.ingress` adds as `app`."""

    app: FastAPI

    async def check_health(self) -> None:
        """Called by Ray: once before the replica gets requests, then every ten seconds.

        Raises:
            RuntimeError: if the engine has ended; Ray starts another replica then.
        """
        api = self.app.state.api
        engine = api.served.engine
        while not api.is_ready and not api.failure and engine.is_alive:
            await asyncio.sleep(READY_LOOK_SECONDS)
        if api.failure:
            raise RuntimeError(api.failure)
        if not engine.is_alive:
            raise RuntimeError(f"the engine has ended: {engine.failure or 'it was stopped'}")


def build(arguments: dict[str, Any]) -> serve.Application:
    """What `serve run` runs. arguments: settings by their names, those of infer_api.py among them.

    Raises:
        ToolkitError: for an unknown name, a value that is not allowed, and what is Ray's to say.
    """
    groups = [ServedSettings, ServeSettings, RaySettings]
    which, settings, ray = parse_settings(
        [(group, {}, group.__name__) for group in groups],
        [f"--{name}={_written(value)}" for name, value in arguments.items()],
        description="Serve a model under Ray Serve.",
    )
    if (settings.host, settings.port) != (ServeSettings.host, ServeSettings.port):
        raise ToolkitError(
            "host and port are Ray's here: serve start --http-host HOST --http-port PORT, or"
            " http_options in a config file"
        )
    check_checkpoint(which)
    # Here, since the environment and the folder of this process need not be the replicas'.
    keys = read_keys(settings.api_keys_file, os.environ)
    if not keys:
        print("note: no API keys are set: whoever reaches Ray's proxies can use this server")
    which, num_gpus = _with_full_paths(which), ray.num_gpus
    if num_gpus is None:
        num_gpus = float(which.device != "cpu" and torch.cuda.is_available())
    deployment = serve.deployment(
        num_replicas=ray.num_replicas,
        ray_actor_options={"num_cpus": ray.num_cpus, "num_gpus": num_gpus},
        max_ongoing_requests=settings.max_running + settings.max_waiting + PLACES_BESIDE,
        max_queued_requests=settings.max_waiting,  # at a proxy, while no replica can take them
        graceful_shutdown_timeout_s=settings.grace_seconds,
    )
    return deployment(serve.ingress(_builder(which, settings, keys))(ChatGLM)).bind()


def _written(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _with_full_paths(which: ServedSettings) -> ServedSettings:
    """Replicas have another working folder; names on a hub stay as they are."""

    def full(path: str) -> str:
        return os.path.abspath(path) if path and os.path.exists(path) else path

    return dataclasses.replace(
        which,
        checkpoint=full(which.checkpoint),
        model_name_or_path=full(which.model_name_or_path),
        adapters={name: full(path) for name, path in which.adapters.items()},
    )


def _builder(
    which: ServedSettings, settings: ServeSettings, keys: Sequence[str]
) -> Callable[[], FastAPI]:
    """What makes a replica's application, in its process."""

    def make() -> FastAPI:
        logging.basicConfig(format="%(levelname)s: %(message)s")
        logging.getLogger("chatglm").setLevel(logging.INFO)
        return build_app(load_served(which, settings), keys)

    return make
