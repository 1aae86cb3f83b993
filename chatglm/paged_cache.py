"""Keys and values in pages, which rows of any length take and give back one by one.

A cache with room for the longest answer in every row would stand mostly empty. Here a row holds as
many pages as its tokens fill, wherever they are (Kwon et al. 2023, "Efficient Memory Management
for Large Language Model Serving with PagedAttention"). This is the plain way, for the model's own
forward pass: each step gathers a row's pages into one tensor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

PAGE_TOKENS = 64


@dataclass
class Places:
    """Where the tokens of one pass go, and where those before them are.

    rows, columns, pages, offsets (N,): the token in this row and column of the pass, virtual tokens
    counted, goes to this place of this page. table (B, pages of the longest row), or None where
    nothing comes before, and num_keys, the longest row's tokens with the new ones.
    """

    rows: Tensor
    columns: Tensor
    pages: Tensor
    offsets: Tensor
    table: Tensor | None = None
    num_keys: int = 0


class PagedLayer(CacheLayerMixin):
    """One layer's keys and values, each (pages, H, PAGE_TOKENS, D)."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self.places: Places | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the pages are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Put (B, H, T, D) where `places` has it; gives all keys and values, (B, H, S, D)."""
        places = self.places
        assert places is not None
        for stored, new in ((self.keys, key_states), (self.values, value_states)):
            stored[places.pages, :, places.offsets] = new[places.rows, :, places.columns]
        if places.table is None:
            return key_states, value_states
        return self._gathered(self.keys, places), self._gathered(self.values, places)

    @staticmethod
    def _gathered(stored: Tensor, places: Places) -> Tensor:
        rows = stored[places.table].transpose(1, 2)  # (B, H, pages, PAGE_TOKENS, D)
        return rows.flatten(2, 3)[:, :, : places.num_keys]

    def get_seq_length(self) -> int:
        """Tokens of the longest row before this pass."""
        assert self.places is not None
        return 0 if self.places.table is None else self.places.num_keys - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(S, offset) of the keys that `update` will give."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1


class PagedCache(Cache):
    """The pages of all layers."""

    def __init__(self, model, *, num_pages: int):
        config = model.config
        shape = (num_pages, config.num_attention_heads, PAGE_TOKENS, config.head_width)
        empty = {"dtype": model.transformer.dtype, "device": model.device}
        super().__init__(
            layers=[
                PagedLayer(torch.zeros(shape, **empty), torch.zeros(shape, **empty))
                for _ in range(config.num_layers)
            ]
        )

    def place(self, places: Places) -> None:
        """Where the next pass reads and writes."""
        for layer in self.layers:
            assert isinstance(layer, PagedLayer)
            layer.places = places


def bytes_per_page(model) -> int:
    """Of keys and values of all layers."""
    config, size = model.config, model.transformer.dtype.itemsize
    return 2 * config.num_layers * config.hidden_size * PAGE_TOKENS * size


def padded(rows: list[list[int]], device: torch.device) -> Tensor:
    """(B, longest) of rows of numbers, 0 where a row has no more."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
