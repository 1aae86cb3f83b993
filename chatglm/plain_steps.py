"""The model's own forward pass as decoding steps, for whatever captured steps can't do."""

import torch
from torch import Tensor

from .cache import KVCache
from .positions import find_context, token_index
from .sampling import guard_scores


class PlainSteps:
    """The model's own forward pass, over a cache with room for `max_new_tokens` more."""

    def __init__(
        self, model, input_ids: Tensor, attention_mask: Tensor | None, *, max_new_tokens: int
    ):
        self.model, self.mask = model, attention_mask
        config = model.config
        self.context_lengths, self.mask_positions = find_context(
            input_ids,
            attention_mask,
            bos_token_id=config.bos_token_id,
            gmask_token_id=config.gmask_token_id,
            mask_token_id=config.mask_token_id,
        )
        room = input_ids.shape[1] + max_new_tokens + (config.pre_seq_len or 0)
        self.cache = KVCache(config.num_layers, capacity=room)
        self.input_ids, self.index = input_ids, token_index(input_ids, attention_mask)
        self._checked = 0

    @torch.inference_mode()
    def scores(self, tokens: Tensor, *, last_only: bool = True) -> Tensor:
        """Those after the last of tokens (B, T), (B, V), or after each, (B, T, V)."""
        logits = self.model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.index,
            context_lengths=self.context_lengths,
            mask_positions=self.mask_positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=int(last_only),
        ).logits
        return logits[:, -1] if last_only else logits

    def advance(self, number: int) -> None:
        """The next tokens are so many further on; each row gets one more if there is a mask."""
        self.index = self.index[:, -1:] + number
        if self.mask is not None:
            self.mask = torch.cat((self.mask, self.mask.new_ones(len(self.mask), 1)), dim=1)

    def start(self) -> int:
        """See drafts.Checker; one row without pads."""
        likeliest = guard_scores(self.scores(self.input_ids)).argmax(dim=-1)
        self.advance(1)
        return int(likeliest)

    def check(self, tokens: list[int]) -> list[int]:
        """See drafts.Checker."""
        self._checked, first = len(tokens), self.index[:, :1]
        self.index = first + torch.arange(len(tokens), device=first.device)
        given = torch.tensor([tokens], device=self.input_ids.device)
        scores = guard_scores(self.scores(given, last_only=False)[0])
        self.index = first
        return scores.argmax(dim=-1).tolist()

    def keep(self, number: int) -> None:
        """See drafts.Checker."""
        self.cache.crop(number - self._checked)
        self.advance(number)
