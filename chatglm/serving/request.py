"""What a client asks for, and its row of the batch."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from ..growing_text import GrowingText
from ..sampling import Sampling

Reason = Literal["stop", "length"]


@dataclass(frozen=True)
class Request:
    """One answer to one prompt."""

    prompt: tuple[int, ...]
    """Token ids, [gMASK] <sop> at the end."""
    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    """The same request with the same seed has the same answer, whoever else is served."""
    adapter: str | None = None
    """Name of the adapter that answers; None: the bare weights."""
    stops: tuple[str, ...] = ()
    """Strings that end the answer and are not part of it."""
    deadline: float = float("inf")
    """On the clock of time.monotonic()."""
    is_counted: bool = True
    """In the metrics."""


@dataclass
class Update:
    """What is new of an answer: text, and at the end how it ended, or why it failed."""

    text: str = ""
    num_tokens: int = 0
    """Of the answer so far."""
    finish_reason: Reason | None = None
    error: str | None = None
    error_status: int = 500
    """As HTTP has it."""

    @property
    def is_last(self) -> bool:
        """Nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False)
class Row:
    """A request on its way through the batch."""

    request: Request
    deliver: Callable[[Update], None]
    """Told each update, in the engine's thread."""
    answer: GrowingText
    arrived: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    """Of the answer, as far as they are known."""
    num_told: int = 0
    """Tokens of the answer that the model was told to produce; some may not be known yet."""
    pages: list[int] = field(default_factory=list)
    """Of the cache, in the order of the tokens in them."""
    last_token_at: float | None = None
    is_accepted: bool = False
    """It has been in the batch."""
    is_over: bool = False

    @property
    def text_ids(self) -> list[int]:
        """Prompt and answer so far."""
        return [*self.request.prompt, *self.tokens]

    @property
    def num_cached(self) -> int:
        """Tokens that stand in the cache once all that was told is done, virtual ones aside."""
        return len(self.request.prompt) + max(self.num_told - 1, 0)

    @property
    def wants_more(self) -> bool:
        """False once the model was told to produce all tokens that were asked for."""
        return self.num_told < self.request.max_new_tokens
