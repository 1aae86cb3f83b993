"""2-D rotary positions, with the angles the released weights were trained on.

Half of each head turns by the position in the text, the other half by the position in the answer
block (GLM, Du et al. 2022, section 2.1; rotation after RoFormer, Su et al. 2021). The released
code keeps `inv_freq` in fp16, and in fp16 runs rounds the angle and its cosine to fp16 as well.
Weights served at other angles give other numbers, so bf16 and quantised runs use the fp16 tables;
only fp32 runs take fp32 angles, as the released code does.
"""

from functools import cache

import torch
from torch import Tensor

BASE = 10000.0


@cache  # for good: captured graphs go on reading them
def rotary_tables(
    max_length: int, dim: int, *, half: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position, each (max_length, dim) in fp32.

    half: round angles and values to fp16, as the released code does in fp16. Plain tensors in a
    cache and not buffers of the model: buffers follow `model.half()` and lose what they were.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
    inv_freq = (1.0 / BASE**exponents).half().float()
    angles = torch.outer(torch.arange(max_length).float(), inv_freq)
    if half:
        angles = angles.half().float()
    angles = torch.cat((angles, angles), dim=-1)
    cos, sin = angles.cos(), angles.sin()
    if half:
        cos, sin = cos.half().float(), sin.half().float()
    return cos.to(device), sin.to(device)


def rotary_for_positions(
    position_ids: Tensor, *, max_length: int, head_width: int, half: bool
) -> tuple[Tensor, Tensor]:
    """Cosine and sine for a batch, each (B, 1, T, D) in fp32, from position_ids (B, 2, T).

    The first half of D follows row 0 (text), the second row 1 (block).
    """
    dim = head_width // 2
    tables = rotary_tables(max_length, dim, half=half, device=position_ids.device)
    cos, sin = (table[position_ids].transpose(1, 2).flatten(2)[:, None] for table in tables)
    return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, T, D) turned by cos and sin (B, 1, T, D); in fp32, given back in x's dtype.

    "Rotate half" within each half of D: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin).
    """
    quarters = x.float().unflatten(-1, (2, 2, -1))
    turned = torch.stack((-quarters[..., 1, :], quarters[..., 0, :]), dim=-2).flatten(-3)
    return (x.float() * cos + turned * sin).to(x.dtype)
