"""The decoding loop: one prefill, then one token a step into a cache with room for all of them.

Two roads to the same tokens: steps captured as CUDA graphs (steps.py), and the plain one, which is
the model's own forward pass, for whatever those can't do; on a GPU, the reason is said once.
"""

import logging
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .cache import KVCache
from .kernels.ops import MOST_TOP_K
from .positions import find_context, token_index
from .sampling import Sampling, choose_tokens
from .steps import CapturedStep, get_step, reason_against

logger = logging.getLogger("chatglm")

STEPS_AHEAD = 4
"""Steps that the GPU may be told before their tokens have been looked at."""
POLL_SECONDS = 5e-5
SECONDS_BETWEEN_CHECKS = 1.0
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
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,), until all rows have ended or the limit is reached.

    input_ids (B, T), padded on the left where attention_mask (B, T) is 0. A row that has ended
    goes on with the pad token. A row that never yields one of eos_token_ids was cut by the limit.
    """
    reason = _reason_for_plain_steps(model, sampling, logits_processor)
    if reason is None:
        seed = _seed_of(generator)
        chosen = _captured_tokens(
            model, input_ids, attention_mask, sampling, seed=seed, max_new_tokens=max_new_tokens
        )
    else:
        if model.device.type == "cuda" and reason not in _said:
            _said.add(reason)
            logger.warning("decoding at the slower, plain pace: %s", reason)
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


def _reason_for_plain_steps(
    model, sampling: Sampling, logits_processor: LogitsProcessorList | None
) -> str | None:
    if logits_processor:
        return "a logits_processor was given"
    if sampling.do_sample and not 0 < sampling.top_k <= MOST_TOP_K:
        return f"top_k {sampling.top_k}; 1 to {MOST_TOP_K} are faster"
    return reason_against(model)


def _seed_of(generator: torch.Generator | None) -> int:
    """The generator's seed, or one drawn from torch's own."""
    if generator is not None:
        return generator.initial_seed()
    return int(torch.randint(2**32, (1,)))


@torch.inference_mode()
def _captured_tokens(
    model,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    sampling: Sampling,
    *,
    seed: int,
    max_new_tokens: int,
) -> Iterator[Tensor]:
    """The tokens of each step, (B,) on the CPU; those of a row that has ended mean nothing.

    The GPU is told some steps ahead, so that it never waits for the host.
    """
    prompts, mask = _padded_on_the_right(input_ids, attention_mask)
    room = prompts.shape[1] + max_new_tokens + (model.config.pre_seq_len or 0)
    step = get_step(model, rows=len(prompts), room=room)
    step.prefill(prompts, mask)
    step.set_rules(sampling, seed=seed, so_far=prompts)
    step.first_token()
    told = 1
    for number in range(max_new_tokens):
        while told < min(number + STEPS_AHEAD, max_new_tokens):
            step.next_token()
            told += 1
        yield _wait_for_tokens(step, number)


def _wait_for_tokens(step: CapturedStep, number: int) -> Tensor:
    tokens = step.history[number]
    checked = time.monotonic()
    while (tokens == step.UNWRITTEN).any():
        time.sleep(POLL_SECONDS)
        if time.monotonic() - checked > SECONDS_BETWEEN_CHECKS:
            torch.cuda.current_stream().query()  # raises what went wrong on the GPU
            checked = time.monotonic()
    return tokens.long()


def _padded_on_the_right(
    input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rows turned so that their pads stand behind; no mask where there are none."""
    if attention_mask is None or bool(attention_mask.all()):
        return input_ids, None
    order = (attention_mask == 0).long().argsort(dim=1, stable=True)
    return input_ids.gather(1, order), attention_mask.gather(1, order)


@torch.inference_mode()
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
    config = model.config
    context_lengths, mask_positions = find_context(
        input_ids,
        attention_mask,
        bos_token_id=config.bos_token_id,
        gmask_token_id=config.gmask_token_id,
        mask_token_id=config.mask_token_id,
    )
    batch_size, prompt_length = input_ids.shape
    room = prompt_length + max_new_tokens + (config.pre_seq_len or 0)
    cache = KVCache(config.num_layers, capacity=room)
    processors = LogitsProcessorList([*(logits_processor or []), *sampling.processors()])
    index, tokens, mask = token_index(input_ids, attention_mask), input_ids, attention_mask
    so_far = input_ids
    for _ in range(max_new_tokens):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=index,
            context_lengths=context_lengths,
            mask_positions=mask_positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        chosen = choose_tokens(logits, so_far, sampling, processors, generator=generator)
        yield chosen.cpu()
        tokens, index = chosen[:, None], index[:, -1:] + 1
        so_far = torch.cat((so_far, tokens), dim=1)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(batch_size, 1)), dim=1)
