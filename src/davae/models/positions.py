"""Where a token is: the fixed sin-cos table and two-dimensional rotary embedding (RoPE).

Both are computed from the grid in float32 whenever they are needed, and stored nowhere. The cost is
negligible beside one block; in exchange a model may be cast to half precision without rounding its angles,
and takes a grid of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def grid_positions(height: int, width: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Row and column of every token in reading order: two float32 tensors [height * width]."""
    rows = torch.arange(height, dtype=torch.float32, device=device)
    columns = torch.arange(width, dtype=torch.float32, device=device)
    return rows.repeat_interleave(width), columns.repeat(height)


def _angles(position: Tensor, count: int) -> Tensor:
    """``position * 10000^(-i / count)`` for i < count: [N] -> [N, count]."""
    exponent = torch.arange(count, dtype=torch.float32, device=position.device) / count
    return position[:, None] * 10000.0**-exponent


def sincos_table(height: int, width: int, channels: int, device: torch.device | None = None) -> Tensor:
    """Fixed position table [height * width, channels], float32.

    The first half of the channels encodes the column, the second the row; each half is all sines, then all
    cosines, of ``channels / 4`` frequencies from 1 down to 1/10000. `channels` must divide by four.
    """
    row, column = grid_positions(height, width, device)
    column_angle, row_angle = _angles(column, channels // 4), _angles(row, channels // 4)
    return torch.cat([column_angle.sin(), column_angle.cos(), row_angle.sin(), row_angle.cos()], dim=1)


def rope_table(
    height: int, width: int, head_channels: int, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the rotation angles, each [height * width, head_channels / 2], float32.

    The first half of a head's channel pairs turns with the row, the second with the column, each through
    ``head_channels / 4`` frequencies from 1 down. `head_channels` must divide by four.
    """
    row, column = grid_positions(height, width, device)
    angle = torch.cat([_angles(row, head_channels // 4), _angles(column, head_channels // 4)], dim=1)
    return angle.cos(), angle.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of every token by its angles; keeps the dtype of `x`.

    The product of a rotated query and a rotated key depends on their positions through the difference only:
    (R(p) q) . (R(p') k) = q . R(p' - p) k   (Su et al. 2021, arXiv 2104.09864).

    Args:
        x: queries or keys, [B, heads, tokens, head_channels].
        cos: from :func:`rope_table`, [tokens, head_channels / 2].
        sin: the same.
    """
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)  # [B, heads, tokens, head_channels / 2] each
    rotated = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)
