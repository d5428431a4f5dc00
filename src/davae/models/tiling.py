"""Large inputs in overlapping tiles, blended so that no seam shows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    cell_in: int,
    cell_out: int,
) -> Tensor:
    """``function(x)``, computed tile by tile.

    Tiles all have the same size; the last one of a row or column is moved back to end with the input. Where
    tiles overlap, their outputs are mixed with linear ramps. The outer quarter of an overlap gets no weight
    at all: there the convolutions see the tile's zero padding instead of the image.

    Group norms and attention see one tile at a time, so the result is close to ``function(x)`` but not equal.

    Args:
        function: maps ``[B, C, n * cell_in, m * cell_in]`` to ``[B, C', n * cell_out, m * cell_out]``.
        x: ``[B, C, H, W]``, sides multiples of ``cell_in``.
        tile, overlap: in cells (latent positions), ``overlap < tile``.
        cell_in, cell_out: side of one cell in the input and in the output.

    Returns:
        ``[B, C', H / cell_in * cell_out, W / cell_in * cell_out]`` in the dtype of ``function``'s output.
    """
    rows, columns = x.shape[-2] // cell_in, x.shape[-1] // cell_in
    total: Tensor | None = None
    weights = torch.zeros(rows * cell_out, columns * cell_out, device=x.device)
    for top in _starts(rows, tile, overlap):
        for left in _starts(columns, tile, overlap):
            y = function(_crop(x, top, left, tile, cell_in))
            if total is None:
                total = torch.zeros(*y.shape[:-2], *weights.shape, device=y.device)
            weight = torch.outer(
                _ramps(top, rows, tile, overlap, cell_out, x.device),
                _ramps(left, columns, tile, overlap, cell_out, x.device),
            )
            _crop(total, top, left, tile, cell_out).add_(y.float() * weight)
            _crop(weights, top, left, tile, cell_out).add_(weight)
    assert total is not None
    return (total / weights).to(y.dtype)


def _crop(x: Tensor, top: int, left: int, tile: int, cell: int) -> Tensor:
    """The part of ``x`` under a tile, as a view."""
    rows, columns = (slice(start * cell, (start + tile) * cell) for start in (top, left))
    return x[..., rows, columns]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """First cells of the tiles along one side."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramps(start: int, size: int, tile: int, overlap: int, cell: int, device: torch.device) -> Tensor:
    """Blending weights of one tile along one side, in output positions; 1 towards the border of the whole."""
    tile = min(tile, size)
    length, margin = overlap * cell, overlap * cell // 4
    position = torch.arange(tile * cell, device=device, dtype=torch.float32) + 0.5
    weight = torch.ones_like(position)
    if length and start > 0:
        weight = weight * ((position - margin) / (length - 2 * margin)).clamp(0, 1)
    if length and start + tile < size:
        weight = weight * ((position.flip(0) - margin) / (length - 2 * margin)).clamp(0, 1)
    return weight
