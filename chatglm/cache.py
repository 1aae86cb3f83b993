"""Keys and values of the tokens so far, written in place.

transformers' DynamicCache concatenates, which copies the whole cache at every token. This one
writes into room kept ahead and hands out views of the filled part. It is a transformers `Cache`,
so beams, candidate decoding and `past_key_values=` arguments work on it.
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 256
"""Room is kept in steps of so many tokens when the final length is not told."""


class InPlaceLayer(CacheLayerMixin):
    """One layer's keys and values, (B, H, capacity, D), the first `length` columns filled."""

    is_croppable = True
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int = 0):
        super().__init__()
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room shaped like the first keys and values."""
        batch, heads, length, width = key_states.shape
        shape = (batch, heads, self._room_for(length), width)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states.new_empty(shape), value_states.new_empty(shape)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append (B, H, T, D); gives views of all keys and values so far, (B, H, S, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self._grow(self._room_for(end))
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _room_for(self, length: int) -> int:
        return max(self.capacity, -(-length // GROWTH) * GROWTH)

    def _grow(self, capacity: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], capacity, old.shape[3]))
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def get_seq_length(self) -> int:
        """Tokens kept."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(S, offset) of the keys that `update` will give for so many new tokens."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def reset(self) -> None:
        """Forget the tokens, keep the room."""
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; transformers gives their number as a negative one."""
        self.length = max(self.length - abs(tokens_to_remove), 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        if not self.is_initialized:
            return
        self._select(
            torch.arange(self.keys.shape[0], device=self.device).repeat_interleave(repeats)
        )

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows named."""
        self._select(indices)

    def _select(self, rows: Tensor) -> None:
        if self.is_initialized:
            self.keys = self.keys.index_select(0, rows.to(self.device))
            self.values = self.values.index_select(0, rows.to(self.device))


class KVCache(Cache):
    """The cache of all layers. `capacity`: tokens to keep room for from the start."""

    def __init__(self, num_layers: int, capacity: int = 0):
        super().__init__(layers=[InPlaceLayer(capacity) for _ in range(num_layers)])
