"""From scores to the next token: the sampling rules, shared by chat, batches and serving.

The rules themselves are transformers' logits processors; here stand their order, the defaults of
the released chat, and its guard against broken scores.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .errors import ToolkitError

GUARD_TOKEN = 5
"""Chosen where a row's scores hold NaN or inf, as the released InvalidScoreLogitsProcessor does."""

LEAST_TEMPERATURE, LEAST_PENALTY = 1e-6, 1e-3
"""Scores divided by less than both could leave fp32."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. top_k 50 is what `generate` applied under the released chat."""

    do_sample: bool = True
    top_p: float = 0.7
    temperature: float = 0.95
    top_k: int = 50
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 < self.top_p <= 1:
            raise ToolkitError(f"top_p {self.top_p}: allowed is above 0 up to 1")
        if self.do_sample and not LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise ToolkitError(
                f"temperature {self.temperature}: allowed is {LEAST_TEMPERATURE} and above; for the"
                " likeliest token at every step set do_sample to false"
            )
        if self.top_k < 0:
            raise ToolkitError(f"top_k {self.top_k}: allowed is 0 (off) and above")
        if not LEAST_PENALTY <= self.repetition_penalty < math.inf:
            raise ToolkitError(
                f"repetition_penalty {self.repetition_penalty}: allowed is {LEAST_PENALTY} and"
                " above; 1 is off"
            )

    def processors(self) -> LogitsProcessorList:
        """The processors in transformers' order: penalty, temperature, top-k, top-p."""
        rules = LogitsProcessorList()
        if self.repetition_penalty != 1.0:
            rules.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if not self.do_sample:
            return rules
        if self.temperature != 1.0:
            rules.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k > 0:
            rules.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1.0:
            rules.append(TopPLogitsWarper(self.top_p))
        return rules


def guard_scores(scores: Tensor) -> Tensor:
    """scores (B, V) with each broken row (NaN or inf) replaced by certainty about token 5."""
    broken = ~torch.isfinite(scores).all(dim=-1, keepdim=True)
    certain = torch.zeros_like(scores)
    certain[..., GUARD_TOKEN] = 5e4
    return torch.where(broken, certain, scores)


def choose_tokens(
    scores: Tensor,
    tokens_so_far: Tensor,
    sampling: Sampling,
    processors: LogitsProcessorList,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The next token of each row, (B,), from scores (B, V) and tokens_so_far (B, S)."""
    processed = processors(tokens_so_far, guard_scores(scores.float()))  # type: ignore[arg-type]
    if not sampling.do_sample:
        return processed.argmax(dim=-1)
    chances = torch.softmax(processed, dim=-1)
    return torch.multinomial(chances, num_samples=1, generator=generator).squeeze(1)
