"""p-tuning v2: trained keys and values before the first token of every layer.

P-Tuning v2 (Liu et al. 2022), laid out as the released `PrefixEncoder` stores it. The virtual
tokens stand before the cache, unrotated, seen by every token, and take no position.
"""

import torch
from torch import Tensor, nn

from .configuration import ChatGLMConfig

DROPOUT = 0.1


class PrefixEncoder(nn.Module):
    """P virtual tokens for every layer, as one embedding or through a two-layer projection."""

    def __init__(self, config: ChatGLMConfig):
        super().__init__()
        assert config.pre_seq_len is not None
        self.num_layers, self.num_heads = config.num_layers, config.num_attention_heads
        width = config.num_layers * 2 * config.hidden_size
        self.trans: nn.Module | None = None
        if config.prefix_projection:
            self.embedding = nn.Embedding(config.pre_seq_len, config.hidden_size)
            self.trans = nn.Sequential(
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.Tanh(),
                nn.Linear(config.hidden_size, width),
            )
        else:
            self.embedding = nn.Embedding(config.pre_seq_len, width)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, batch_size: int, dtype: torch.dtype) -> Tensor:
        """Keys and values (2 * layers, B, H, P, D): key then value of layer 0, of layer 1, ..."""
        rows = self.embedding.weight
        if self.trans is not None:
            rows = self.trans(rows)
        heads = rows.view(rows.shape[0], 2 * self.num_layers, self.num_heads, -1)
        # Dropout draws for every row of the batch, as the released code does.
        batch = heads.permute(1, 2, 0, 3)[:, None].expand(-1, batch_size, -1, -1, -1)
        return self.dropout(batch.to(dtype))


def own_gradient(virtual: Tensor) -> Tensor:
    """The same values, to be put before others: their gradient is copied on its way back.

    Uncopied it is a slice, which keeps the gradient of all keys of a layer in memory until the
    first layer's has come: 0.9 GB for 2 x 1024 tokens in fp16.
    """
    virtual = virtual.view_as(virtual)  # within the layer, so that its turn comes there
    if virtual.requires_grad:
        virtual.register_hook(torch.clone)
    return virtual
