"""Per-channel statistics of latents, and the scaling between raw latents and what a diffusion model sees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError


class ChannelStatistics:
    """Exact running mean and variance per channel, in float64 on the CPU.

    Batches are combined by the parallel form of Welford's method (Chan, Golub and LeVeque 1979), so neither
    the order nor the size of the batches matters beyond rounding.

    Args:
        channels: number of channels ``C``.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0  # values seen per channel
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # sum of (x - mean)^2

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self._mean)

    @property
    def mean(self) -> Tensor:
        """Mean per channel, float64 ``[C]``."""
        self._require_values()
        return self._mean.clone()

    @property
    def std(self) -> Tensor:
        """Population standard deviation per channel, float64 ``[C]``."""
        self._require_values()
        return (self._squares / self.count).sqrt()

    def update(self, latent: Tensor) -> None:
        """Add latents ``[B, C, h, w]`` (any number of trailing dimensions, any float dtype).

        Raises:
            DavaeError: another number of channels, or a value that is not finite (the channel is named).
        """
        if latent.shape[1] != self.channels:
            raise DavaeError(f"the latent has {latent.shape[1]} channels, the statistics {self.channels}")
        values = latent.detach().cpu().double().transpose(0, 1).flatten(1)  # [C, N]
        finite = values.isfinite().all(dim=1)
        if not finite.all():
            raise DavaeError(f"channel {int((~finite).nonzero()[0])} of the latent holds a value that is not finite")
        mean = values.mean(dim=1)
        self._combine(values.shape[1], mean, (values - mean[:, None]).square().sum(dim=1))

    def merge(self, other: ChannelStatistics) -> None:
        """Add everything that ``other`` has seen, e.g. in another process.

        Raises:
            DavaeError: the channel counts differ.
        """
        if other.channels != self.channels:
            raise DavaeError(f"cannot merge statistics of {other.channels} channels into {self.channels}")
        self._combine(other.count, other._mean, other._squares)

    def _combine(self, count: int, mean: Tensor, squares: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        step = mean - self._mean
        self._squares = self._squares + squares + step.square() * (self.count * count / total)
        self._mean = self._mean + step * (count / total)
        self.count = total

    def _require_values(self) -> None:
        if self.count == 0:
            raise DavaeError("no latent has been measured yet: call update() first")

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to continue."""
        return {"count": torch.tensor(self.count), "mean": self._mean.clone(), "squares": self._squares.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state_dict`.

        Raises:
            DavaeError: the channel counts differ.
        """
        if len(state["mean"]) != self.channels:
            raise DavaeError(f"cannot load statistics of {len(state['mean'])} channels into {self.channels}")
        self.count = int(state["count"])
        self._mean, self._squares = state["mean"].double().clone(), state["squares"].double().clone()


def latent_affine(config: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """``shift`` and ``scale``, float32 ``[C]``, that an autoencoder's configuration states.

    ``scaling_factor`` and ``shift_factor`` hold for all channels; where there are ``latents_mean`` and ``latents_std``,
    they are the shift and one over the scale of each channel, times ``scaling_factor``.
    """
    scale = torch.full((channels,), _number(config, "scaling_factor", 1.0))
    shift = torch.full((channels,), _number(config, "shift_factor", 0.0))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        shift = torch.tensor(mean, dtype=torch.float32).flatten()
        scale = scale / torch.tensor(std, dtype=torch.float32).flatten()
    return shift, scale


def to_scaled(latent: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(z - shift) * scale`` of a raw latent ``[B, C, h, w]``; shift and scale ``[C]`` on any device."""
    return (latent - _of_channels(shift, latent)) * _of_channels(scale, latent)


def to_raw(latent: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``z / scale + shift``, the inverse of :func:`to_scaled`."""
    return latent / _of_channels(scale, latent) + _of_channels(shift, latent)


def _of_channels(values: Tensor, latent: Tensor) -> Tensor | float:
    """One number where all channels share it, which half precision does not round; else ``[C, 1, 1]``."""
    return float(values[0]) if (values == values[0]).all() else values.to(latent)[:, None, None]


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    return default if value is None else float(value)
