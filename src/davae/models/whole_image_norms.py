"""Group norms that use the statistics of the whole image while a network sees one tile at a time."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class WholeImageNorms:
    """While active, group norms remember the statistics of the first input and apply them to every later one.

    A group norm takes mean and variance over all positions, so tiles of one image would each be normalised
    differently and their colours and contrast would not meet. Here the first call is made with the whole image,
    reduced to the size of a tile; the tiles then share its statistics.

    Args:
        networks: where to look for group norms. Others (batch, RMS, none) look at single positions already.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._norms = [m for network in networks for m in network.modules() if isinstance(m, nn.GroupNorm)]
        self._statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
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
        self._statistics.clear()

    def _apply(self, norm: nn.GroupNorm, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = arguments[0]  # [B, C, ...]
        groups = x.reshape(x.shape[0], norm.num_groups, -1).float()
        if norm not in self._statistics:
            variance, mean = torch.var_mean(groups, dim=-1, keepdim=True, correction=0)
            self._statistics[norm] = mean, variance
            return output
        mean, variance = self._statistics[norm]
        y = ((groups - mean) * (variance + norm.eps).rsqrt()).reshape(x.shape)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        if norm.affine:
            y = y * norm.weight.float().view(shape) + norm.bias.float().view(shape)
        return y.to(output.dtype)
