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
        self._statistics.clear()
        self._affine.clear()

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
    """Weight and bias in float32, brought back for a moment where offloading took them when ``forward`` ended."""
    hook = getattr(norm, "_hf_hook", None)  # accelerate's
    if (diffusers_hooks := getattr(norm, "_diffusers_hook", None)) is not None:
        hook = diffusers_hooks.get_hook("group_offloading")
    if hook is not None:
        hook.pre_forward(norm)
    weight, bias = (
        values.to(device, torch.float32, copy=hook is not None) for values in (norm.weight, norm.bias)
    )
    if hook is not None:
        hook.post_forward(norm, None)
    return weight, bias
