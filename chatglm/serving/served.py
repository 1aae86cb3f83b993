"""What a server serves: a model with its engine, under its names, within its limits."""

import logging
import secrets
import time
from typing import Any

import psutil
import torch

from ..chat import fit_prompt
from ..errors import ToolkitError, nearest
from ..paged_cache import PAGE_TOKENS, bytes_per_page
from ..sampling import Sampling
from ..supported import reason_against
from ..tokenizer import ChatGLMTokenizer
from .captured import CapturedRunner
from .engine import Engine
from .messages import BadRequest
from .metrics import Metrics
from .request import Request
from .runner import PlainRunner, Runner
from .scheduler import Scheduler
from .settings import ServeSettings

logger = logging.getLogger("chatglm")

BARE = "base"
"""Name of the weights without an adapter, where there are adapters."""
SHARE_OF_MEMORY = 0.5
"""Of what is free, for keys and values, if their number is not given."""


class Served:
    """A loaded model, ready for requests once its engine is started."""

    def __init__(self, model: Any, tokenizer: ChatGLMTokenizer, settings: ServeSettings):
        self.tokenizer, self.settings = tokenizer, settings
        plain, self.adapters = _with_adapters(model, settings.served_model_name)
        """{name of a model in requests: adapter that answers, None for the bare weights}"""
        self.created = int(time.time())
        self.config: Any = plain.config
        longest: int = self.config.max_sequence_length
        asked = settings.max_total_tokens
        if asked is not None and asked > longest:
            raise ToolkitError(f"max_total_tokens {asked}: this model reads at most {longest}")
        self.most_tokens = longest if asked is None else asked
        """Of a prompt and its answer together."""
        num_pages = self._num_pages(plain)
        self.metrics = Metrics(num_pages)
        runner = _runner(plain, num_pages=num_pages, most_rows=settings.max_running)
        self.engine = Engine(
            runner,
            Scheduler(
                num_pages=num_pages,
                page_tokens=PAGE_TOKENS,
                most_running=settings.max_running,
                prefill_tokens=settings.prefill_tokens,
                num_virtual=self.config.pre_seq_len or 0,
                pads=runner.pads,
            ),
            decode=tokenizer.decode,  # type: ignore[arg-type]  # of one list, one text
            eos_token_ids=[self.config.eos_token_id],
            most_waiting=settings.max_waiting,
            metrics=self.metrics,
        )

    def _num_pages(self, model: Any) -> int:
        virtual: int = self.config.pre_seq_len or 0
        of_longest = -(-(self.most_tokens + virtual) // PAGE_TOKENS)
        wanted = of_longest * self.settings.max_running
        asked, each = self.settings.kv_cache_tokens, bytes_per_page(model)
        if asked is not None:
            wanted = -(-asked // PAGE_TOKENS)
            if wanted < of_longest:
                raise ToolkitError(
                    f"kv_cache_tokens {asked}: one request may take"
                    f" {of_longest * PAGE_TOKENS}; raise it, or lower max_total_tokens"
                )
        free = max(
            _free_bytes(model.device)
            - _bytes_of_prompts(self.config, model, self.settings.max_running),
            0,
        )
        most = int(free * (SHARE_OF_MEMORY if asked is None else 1.0) // each)
        if most < (wanted if asked is not None else of_longest):
            raise ToolkitError(
                f"{free / 2**30:.1f} GiB are free beside the model, and the keys and values of"
                f" {wanted * PAGE_TOKENS} tokens take {wanted * each / 2**30:.1f}: lower"
                " max_total_tokens or kv_cache_tokens, or load the model with fewer bits"
            )
        return min(wanted, most)

    def describe(self) -> str:
        """One line for the one who starts it."""
        pages = self.engine.scheduler.pool.num_pages
        names = ", ".join(self.adapters)
        return (
            f"serving {names}: up to {self.settings.max_running} answers at a time, room for"
            f" {pages * PAGE_TOKENS} tokens"
        )

    def adapter(self, model: str | None) -> str | None:
        """The adapter behind a name of a request; None is the model that is served.

        Raises:
            BadRequest: for an unknown name.
        """
        name = self.settings.served_model_name if model is None else model
        if name not in self.adapters:
            known = ", ".join(self.adapters)
            raise BadRequest(
                f"model {name!r} is not served here.{nearest(name, self.adapters)} There are:"
                f" {known}",
                param="model",
                code="model_not_found",
            )
        return self.adapters[name]

    def encode(self, prompt: str | list[int]) -> tuple[int, ...]:
        """Token ids of a prompt, ready for an answer.

        Raises:
            BadRequest: for ids that are no text's.
        """
        if isinstance(prompt, str):
            return tuple(self.tokenizer.encode_prompt(prompt))
        is_control, size = self.tokenizer.sp_model.is_control, self.tokenizer.vocab_size
        for token in prompt:
            if not 0 <= token < size or is_control(token):
                raise BadRequest(f"prompt: {token} is not the id of a text's token", param="prompt")
        return tuple(self.tokenizer.build_inputs_with_special_tokens(prompt))

    def request(
        self,
        prompt: tuple[int, ...],
        sampling: Sampling,
        *,
        most_tokens: int | None = None,
        most_param: str = "max_tokens",
        seed: int | None = None,
        adapter: str | None = None,
        stops: tuple[str, ...] = (),
    ) -> Request:
        """A request within the server's limits. seed: any number; None: one is drawn.

        Raises:
            BadRequest: if prompt and answer are too long.
        """
        room = self.most_tokens - len(prompt)
        if room < (1 if most_tokens is None else most_tokens):
            wanted = "" if most_tokens is None else f" and {most_param} {most_tokens}"
            raise BadRequest(
                f"the prompt is {len(prompt)} tokens long; with it{wanted} the {self.most_tokens}"
                " tokens of prompt and answer together are exceeded: shorten the prompt"
                + (f", or lower {most_param}" if most_tokens is not None else ""),
                param="messages" if most_tokens is None else most_param,
                code="context_length_exceeded",
            )
        return Request(
            prompt,
            room if most_tokens is None else most_tokens,
            sampling,
            seed=secrets.randbits(32) if seed is None else seed % 2**32,
            adapter=adapter,
            stops=stops,
            deadline=time.monotonic() + self.settings.deadline_seconds,
        )

    def conversation(
        self, query: str, history: list[tuple[str, str]], *, max_length: int
    ) -> tuple[tuple[int, ...], int]:
        """The prompt of a chat, and how many of the oldest rounds were dropped so that it fits.

        Raises:
            ToolkitError: if the question alone is too long.
        """
        ids, dropped = fit_prompt(
            self.tokenizer, query, history, max_length=max_length, max_new_tokens=None
        )
        return tuple(ids), dropped


def _runner(model: Any, *, num_pages: int, most_rows: int) -> Runner:
    """Captured steps where the model allows them; else its own forward pass, and why."""
    reason = reason_against(model)
    if reason is None:
        return CapturedRunner(model, num_pages=num_pages, most_rows=most_rows)
    if model.device.type == "cuda":
        logger.warning("serving at the slower, plain pace: %s", reason)
    return PlainRunner(model, num_pages=num_pages)


def _with_adapters(model: Any, name: str) -> tuple[Any, dict[str, str | None]]:
    """The plain model, each row's adapters in it, and the adapters by the names in requests."""
    if not hasattr(model, "peft_config"):
        return model, {name: None}
    from ..tuning.rows import reason_against_rows, with_row_adapters  # with PEFT, which is there

    reason, others = (
        reason_against_rows(model),
        [one for one in model.peft_config if one != "default"],
    )
    if reason and not others:
        logger.info("%s: it is served alone, without a model for the bare weights", reason)
        return model.get_base_model(), {name: None}
    for taken in (name, BARE):
        if taken in others:
            raise ToolkitError(
                f"adapters: {taken!r} is the name of the"
                f" {'model that is served' if taken == name else 'bare weights'}: give the"
                " adapter, or served_model_name, another"
            )
    names = {name: "default", **{other: other for other in others}, BARE: None}
    return with_row_adapters(model), names


def _bytes_of_prompts(config: Any, model: Any, most_rows: int) -> int:
    """What the pass of the longest prompt and a step takes, which on a GPU its graphs keep."""
    if model.device.type != "cuda":
        return 0
    tokens = config.max_sequence_length + most_rows
    return 6 * tokens * config.inner_hidden_size * model.transformer.dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
