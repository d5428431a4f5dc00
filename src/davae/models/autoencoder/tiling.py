"""Large inputs in overlapping tiles, blended so that no seam shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int | tuple[int, int],
    overlap: int | tuple[int, int],
    cell_in: int,
    cell_out: int,
    networks: Sequence[nn.Module] = (),
) -> Tensor:
    """``function(x)``, computed tile by tile.

    Tiles all have the same size; the last one of a row or column is moved back to end with the input. Where tiles
    overlap, their outputs are blended with linear ramps. The outer quarter of an overlap has weight zero, because
    the convolutions there see the tile's zero padding instead of the image. Group norms take their statistics
    from the whole input, reduced to the size of a tile.

    Two differences from ``function(x)`` remain: attention is confined to each tile, and the statistics of the
    group norms are estimates.

    Args:
        function: maps ``[B, C, n * cell_in, m * cell_in]`` to ``[B, C', n * cell_out, m * cell_out]``.
        x: ``[B, C, H, W]``, sides multiples of ``cell_in``.
        tile, overlap: in cells (latent positions), for rows and columns or one number for both; ``overlap < tile``.
        cell_in, cell_out: side of one cell in the input and in the output.
        networks: the modules that ``function`` calls. If they have group norms and use gradient checkpointing, whole
            tiles are checkpointed instead of their stages.

    Returns:
        ``[B, C', H / cell_in * cell_out, W / cell_in * cell_out]`` in the dtype of ``function``'s output.
    """
    tiles, overlaps = ((v, v) if isinstance(v, int) else v for v in (tile, overlap))
    cells = (x.shape[-2] // cell_in, x.shape[-1] // cell_in)
    total: Tensor | None = None
    weights = torch.zeros(cells[0] * cell_out, cells[1] * cell_out, device=x.device)
    with WholeImageNorms(networks) as norms:
        compute = function
        if norms:
            with _without_checkpointing(
                networks
            ):  # recomputing stages would not reproduce the statistics that the hooks record
                function(_reduced(x, tiles, cell_in))
            if torch.is_grad_enabled() and _checkpointing(networks):
                compute = partial(
                    checkpoint,
                    function,
                    use_reentrant=False,
                    context_fn=lambda: (_without_checkpointing(networks), _Again(norms, networks)),
                )
        for top in _starts(cells[0], tiles[0], overlaps[0]):
            for left in _starts(cells[1], tiles[1], overlaps[1]):
                y = compute(_crop(x, (top, left), tiles, cell_in))
                if total is None:
                    total = torch.zeros(*y.shape[:-2], *weights.shape, device=y.device)
                weight = torch.outer(
                    _ramps(top, cells[0], tiles[0], overlaps[0], cell_out, x.device),
                    _ramps(left, cells[1], tiles[1], overlaps[1], cell_out, x.device),
                )
                _crop(total, (top, left), tiles, cell_out).add_(y.float() * weight)
                _crop(weights, (top, left), tiles, cell_out).add_(weight)
    assert total is not None
    return (total / weights).to(y.dtype)


class _Again:
    """Restores the norms' hooks, removed by then, while a tile is recomputed; once per backward pass."""

    def __init__(self, norms: WholeImageNorms, networks: Sequence[nn.Module]) -> None:
        self._norms, self._networks, self._entered = norms, networks, ExitStack()

    def __enter__(self) -> None:
        self._entered.enter_context(self._norms)
        self._entered.enter_context(_without_checkpointing(self._networks))

    def __exit__(self, *_: object) -> None:
        self._entered.close()


def _checkpointing(networks: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules with gradient checkpointing switched on."""
    return [m for network in networks for m in network.modules() if getattr(m, "gradient_checkpointing", False)]


@contextmanager
def _without_checkpointing(networks: Sequence[nn.Module]) -> Iterator[None]:
    switched = _checkpointing(networks)
    for module in switched:
        vars(module)["gradient_checkpointing"] = False
    try:
        yield
    finally:
        for module in switched:
            vars(module)["gradient_checkpointing"] = True


def _reduced(x: Tensor, tile: tuple[int, int], cell: int) -> Tensor:
    """``x`` reduced to fit a tile: images are resampled, latents (cells of one position) subsampled."""
    cells = [side // cell for side in x.shape[-2:]]
    fit, over = min(zip(tile, cells, strict=True), key=lambda pair: pair[0] / pair[1])
    size = [max(1, round(count * fit / over)) * cell for count in cells]
    if cell == 1:  # averaging latents would lower their variance
        return F.interpolate(x, size=size, mode="nearest-exact")
    return F.interpolate(x.float(), size=size, mode="bicubic", antialias=True, align_corners=False).to(x.dtype)


def _crop(x: Tensor, start: tuple[int, int], tile: tuple[int, int], cell: int) -> Tensor:
    """The part of ``x`` under a tile, as a view."""
    rows, columns = (slice(begin * cell, (begin + size) * cell) for begin, size in zip(start, tile, strict=True))
    return x[..., rows, columns]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """First cells of the tiles along one side."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramps(start: int, size: int, tile: int, overlap: int, cell: int, device: torch.device) -> Tensor:
    """Blending weights of one tile along one side, in output positions; 1 at the borders of the whole image."""
    tile = min(tile, size)
    length, margin = overlap * cell, overlap * cell // 4
    position = torch.arange(tile * cell, device=device, dtype=torch.float32) + 0.5
    weight = torch.ones_like(position)
    if length and start > 0:
        weight = weight * ((position - margin) / (length - 2 * margin)).clamp(0, 1)
    if length and start + tile < size:
        weight = weight * ((position.flip(0) - margin) / (length - 2 * margin)).clamp(0, 1)
    return weight


class WholeImageNorms:
    """While active, group norms record the statistics of their first input and apply them to all later ones.

    A group norm computes mean and variance over all positions, so each tile of an image would be normalised
    differently, and colours and contrast would not match. Here the first call is made with the whole image,
    reduced to the size of a tile; the tiles then share its statistics.

    Args:
        networks: modules searched for group norms. Batch and RMS norms already work position by position.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._norms = [m for network in networks for m in network.modules() if isinstance(m, nn.GroupNorm)]
        self._statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self._affine: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __bool__(self) -> bool:
        """Whether there is any group norm."""
        return bool(self._norms)

    def __enter__(self) -> WholeImageNorms:
        self._handles = [norm.register_forward_hook(self._apply) for norm in self._norms]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _apply(self, norm: nn.GroupNorm, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = arguments[0]  # [B, C, ...]
        groups = x.reshape(x.shape[0], norm.num_groups, -1).float()
        if norm not in self._statistics:
            variance, mean = torch.var_mean(groups, dim=-1, keepdim=True, correction=0)
            self._statistics[norm] = mean, variance
            if norm.affine:
                self._affine[norm] = _affine(norm, x.device)
            return output
        mean, variance = self._statistics[norm]
        y = ((groups - mean) * (variance + norm.eps).rsqrt()).reshape(x.shape)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        if norm.affine:
            weight, bias = self._affine[norm]
            y = y * weight.view(shape) + bias.view(shape)
        return y.to(output.dtype)


def _affine(norm: nn.GroupNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias in float32, loaded back briefly if offloading removed them after ``forward``."""
    hook = getattr(norm, "_hf_hook", None)  # accelerate's
    if (diffusers_hooks := getattr(norm, "_diffusers_hook", None)) is not None:
        hook = diffusers_hooks.get_hook("group_offloading")
    if hook is not None:
        hook.pre_forward(norm)
    weight, bias = (values.to(device, torch.float32, copy=hook is not None) for values in (norm.weight, norm.bias))
    if hook is not None:
        hook.post_forward(norm, None)
    return weight, bias
