"""The language-model loss: the shift of the labels is written here and nowhere else."""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of a token that is read but not learned."""


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy, a scalar in fp32, over the labelled tokens of the batch.

    logits (B, T, V), labels (B, T) with -100 where nothing is learned: logits at t predict the
    label at t + 1.
    """
    shifted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=IGNORE)
