"""The decoding loop: one prefill, then one token a step into a cache with room for all of them."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LogitsProcessorList

from .cache import KVCache
from .positions import find_context, token_index
from .sampling import Sampling, choose_tokens


@torch.inference_mode()
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
    ends = torch.tensor(eos_token_ids, device=input_ids.device)
    index, tokens, mask = token_index(input_ids, attention_mask), input_ids, attention_mask
    so_far = input_ids
    finished = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
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
        chosen = torch.where(finished, config.pad_token_id, chosen)
        yield chosen
        finished = finished | torch.isin(chosen, ends)
        if bool(finished.all()):
            return
        tokens, index = chosen[:, None], index[:, -1:] + 1
        so_far = torch.cat((so_far, tokens), dim=1)
        if mask is not None:
            mask = torch.cat((mask, mask.new_ones(batch_size, 1)), dim=1)
