"""The decoding loop: one prefill, then one token a step into a cache with room for all of them.

Two roads to the same tokens: steps captured as CUDA graphs (steps.py), and the plain one, which is
the model's own forward pass, for whatever those can't do; on a GPU, the reason is said once.
"""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .drafts import MOST_DRAFTED, DraftedStep, checked_tokens
from .errors import ToolkitError
from .kernels.ops import MOST_TOP_K
from .plain_steps import PlainSteps
from .sampling import Sampling, choose_tokens
from .steps import lent_step
from .supported import reason_against

logger = logging.getLogger("chatglm")

STEPS_AHEAD = 4
"""Steps that the GPU may be told before their tokens have been looked at."""
_said: set[str] = set()


def generate_tokens(
    model,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling,
    eos_token_ids: list[int],
    attention_mask: Tensor | None = None,
    logits_processor: LogitsProcessorList | None = None,
    generator: torch.Generator | None = None,
    prompt_lookup_tokens: int = 0,
    kv_cache_bits: int = 16,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,), until all rows have ended or the limit is reached.

    input_ids (B, T), padded on the left where attention_mask (B, T) is 0. A row that has ended
    goes on with the pad token. A row that never yields one of eos_token_ids was cut by the limit.
    prompt_lookup_tokens: so many are drafted at a time, see drafts.py; one greedy row only.
    kv_cache_bits: 16 (the model's precision) or 8, see step_cache.py; 8 in captured steps only.

    Raises:
        ToolkitError: if one of the last two can't be had with the other arguments, or here.
    """
    if prompt_lookup_tokens:
        padded = attention_mask is not None and not attention_mask.all()
        _check_lookup(
            prompt_lookup_tokens, input_ids, sampling, logits_processor, has_pads=bool(padded)
        )
    reason = _reason_for_plain_steps(model, sampling, logits_processor)
    _check_cache_bits(kv_cache_bits, reason, prompt_lookup_tokens)
    if reason is not None and model.device.type == "cuda" and reason not in _said:
        _said.add(reason)
        logger.warning("decoding at the slower, plain pace: %s", reason)
    if prompt_lookup_tokens:
        chosen = _looked_up_tokens(
            model,
            input_ids,
            captured=reason is None,
            most_drafted=prompt_lookup_tokens,
            max_new_tokens=max_new_tokens,
        )
    elif reason is None:
        seed = _seed_of(generator)
        chosen = _captured_tokens(
            model,
            input_ids,
            attention_mask,
            sampling,
            seed=seed,
            max_new_tokens=max_new_tokens,
            cache_bits=kv_cache_bits,
        )
    else:
        chosen = _plain_tokens(
            model,
            input_ids,
            attention_mask,
            sampling,
            logits_processor=logits_processor,
            generator=generator,
            max_new_tokens=max_new_tokens,
        )
    finished = torch.zeros(len(input_ids), dtype=torch.bool)
    ends, pad = torch.tensor(eos_token_ids), model.config.pad_token_id
    for tokens in chosen:
        shown = torch.where(finished, pad, tokens)
        yield shown
        finished |= torch.isin(shown, ends)
        if finished.all():
            return


def _check_lookup(
    number: int,
    input_ids: Tensor,
    sampling: Sampling,
    logits_processor: LogitsProcessorList | None,
    *,
    has_pads: bool,
) -> None:
    if not 0 < number <= MOST_DRAFTED:
        raise ToolkitError(f"prompt_lookup_tokens {number}: allowed is 0 (off) to {MOST_DRAFTED}")
    reason = (
        "do_sample: set it to false" if sampling.do_sample
        else "a repetition_penalty: leave it at 1.0" if sampling.repetition_penalty != 1.0
        else "a logits_processor" if logits_processor
        else f"{len(input_ids)} rows: give one at a time" if len(input_ids) > 1
        else "pads: give the row without them" if has_pads
        else None
    )  # fmt: skip
    if reason:
        raise ToolkitError(f"prompt_lookup_tokens {number} can't be had with {reason}")


def _check_cache_bits(bits: int, reason: str | None, prompt_lookup_tokens: int) -> None:
    if bits not in (8, 16):
        raise ToolkitError(f"kv_cache_bits {bits}: allowed are 16 and 8")
    if bits == 8 and reason is not None:
        raise ToolkitError(f"kv_cache_bits 8 can't be had here: {reason}; leave it at 16")
    if bits == 8 and prompt_lookup_tokens:
        raise ToolkitError(
            "kv_cache_bits 8 can't be had with prompt_lookup_tokens: set one of them"
        )


def _reason_for_plain_steps(
    model, sampling: Sampling, logits_processor: LogitsProcessorList | None
) -> str | None:
    if logits_processor:
        return "a logits_processor was given"
    if sampling.do_sample and not 0 < sampling.top_k <= MOST_TOP_K:
        return f"top_k {sampling.top_k}; 1 to {MOST_TOP_K} are faster"
    return reason_against(model)


def _seed_of(generator: torch.Generator | None) -> int:
    """Drawn from the generator, or from torch's own."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**32, (1,), generator=generator, device=device))


@torch.inference_mode()
def _captured_tokens(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    sampling: Sampling,
    *,
    seed: int,
    max_new_tokens: int,
    cache_bits: int,
) -> Iterator[Tensor]:
    """The tokens of each step, (B,) on the CPU; those of a row that has ended mean nothing.

    The GPU is told some steps ahead, so that it never waits for the host.
    """
    prompts, mask = _padded_on_the_right(input_ids, attention_mask)
    room = prompts.shape[1] + max_new_tokens + (model.config.pre_seq_len or 0)
    with lent_step(model, rows=len(prompts), room=room, cache_bits=cache_bits) as step:
        step.prefill(prompts, mask)
        step.set_rules(sampling, seed=seed, so_far=prompts)
        step.first_token()
        told = 1
        for number in range(max_new_tokens):
            while told < min(number + STEPS_AHEAD, max_new_tokens):
                step.next_token()
                told += 1
            yield step.wait_for(number)


def _padded_on_the_right(
    input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows turned so that their pads stand behind; no mask where there are none."""
    if attention_mask is None or bool(attention_mask.all()):
        return input_ids, None
    order = (attention_mask == 0).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


def _plain_tokens(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    sampling: Sampling,
    *,
    logits_processor: LogitsProcessorList | None,
    generator: torch.Generator | None,
    max_new_tokens: int,
) -> Iterator[Tensor]:
    """The same through the model's forward pass."""
    steps = PlainSteps(model, input_ids, attention_mask, max_new_tokens=max_new_tokens)
    processors = LogitsProcessorList([*(logits_processor or []), *sampling.processors()])
    tokens, so_far = input_ids, input_ids
    for _ in range(max_new_tokens):
        chosen = choose_tokens(
            steps.scores(tokens), so_far, sampling, processors, generator=generator
        )
        yield chosen.cpu()
        steps.advance(1)
        tokens = chosen[:, None]
        so_far = torch.cat((so_far, tokens), dim=1)


def _looked_up_tokens(
    model, input_ids: Tensor, *, captured: bool, most_drafted: int, max_new_tokens: int
) -> Iterator[Tensor]:
    """Greedy tokens (1,), several from one pass where the answer repeats what was said."""
    room = input_ids.shape[1] + max_new_tokens + (model.config.pre_seq_len or 0)
    lent: Any = (
        lent_step(model, rows=1 + most_drafted, room=room, kind=DraftedStep)
        if captured
        else contextlib.nullcontext(
            PlainSteps(model, input_ids, None, max_new_tokens=max_new_tokens + most_drafted)
        )
    )
    with lent as checker:
        if captured:
            checker.read(input_ids)
        for token in checked_tokens(
            checker, input_ids[0].tolist(), most_drafted=most_drafted, max_new_tokens=max_new_tokens
        ):
            yield torch.tensor([token])
