"""Per-channel statistics of latents, and the scaling between raw latents and what a diffusion model sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError


class ChannelStatistics:
    """Running mean and standard deviation per channel, in float64 on the CPU.

    Batches are combined by the parallel form of Welford's method (Chan, Golub and LeVeque 1979), so the
    order and size of the batches matter only to rounding.

    Args:
        channels: number of channels ``C``.

    Raises:
        DavaeError: fewer than one channel.
    """

    def __init__(self, channels: int) -> None:
        if channels < 1:
            raise DavaeError(f"statistics need at least one channel, not {channels}")
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

    def of_all_elements(self) -> tuple[float, float]:
        """Mean and standard deviation of the elements of all channels together."""
        mean = self.mean.mean()
        variance = (self.std.square() + (self.mean - mean).square()).mean()
        return float(mean), float(variance.sqrt())

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
        """Add everything that ``other`` has seen, for example in another process.

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
        """Count, means and sums of squares, from which :meth:`load_state_dict` continues."""
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


def check_statistics(config: Mapping[str, Any]) -> None:
    """Check the latent statistics in an autoencoder's configuration.

    Args:
        config: entries may be absent or None.

    Raises:
        DavaeError: a factor or a deviation that is not finite and above 0, a shift or mean that is not finite, or
            another number of values than channels; names the entry.
    """
    for name, low in (("scaling_factor", 0.0), ("shift_factor", None)):
        if config.get(name) is not None:
            _check_values(name, [config[name]], above=low)
    channels = config.get("z_dim") or config.get("latent_channels")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None and len(mean) != len(std):
        raise DavaeError(
            f"latents_mean has {len(mean)} values, latents_std {len(std)}: it must be one a channel in both"
        )
    for values in (mean, std):  # of videos they may stand for every channel and frame
        if values is not None and isinstance(channels, int) and len(_flat(values)) % channels:
            raise DavaeError(
                f"latents_mean or latents_std has {len(_flat(values))} values, and there are {channels} channels"
            )
    check_channel_statistics("latents_mean", mean, "latents_std", std, None)


def check_channel_statistics(mean_name: str, mean: Any, std_name: str, std: Any, channels: int | None) -> None:
    """Check per-channel means and standard deviations; either may be None.

    Args:
        mean_name, std_name: their names in an error.
        mean, std: numbers, one per channel.
        channels: the required number; None for any.

    Raises:
        DavaeError: another number of values, one that is not finite, or a deviation that is not above 0.
    """
    for name, values, above in ((mean_name, mean, None), (std_name, std, 0.0)):
        if values is None:
            continue
        numbers = _flat(values)
        if channels is not None and len(numbers) != channels:
            raise DavaeError(f"{name} has {len(numbers)} values, and there are {channels} channels")
        _check_values(name, numbers, above=above)


def _flat(values: Any) -> list[Any]:
    """The numbers in nested lists and tensors, flat; other values unchanged, for the error that names them."""
    if isinstance(values, Tensor):
        return values.flatten().tolist()
    return [one for part in values for one in _flat(part)] if isinstance(values, list | tuple) else [values]


def _check_values(name: str, values: Sequence[Any], *, above: float | None) -> None:
    for number, value in enumerate(values):
        which = f"{name}[{number}]" if len(values) > 1 else name
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DavaeError(f"{which} must be a number, not {value!r}")
        if not math.isfinite(value) or (above is not None and not value > above):
            wanted = "finite" if above is None else "finite and above 0"
            raise DavaeError(f"{which} is {value}: it must be {wanted}")


def latent_affine(config: Mapping[str, Any], channels: int) -> tuple[Tensor, Tensor]:
    """``shift`` and ``scale``, float32 ``[C]``, that an autoencoder's configuration states.

    ``shift = shift_factor`` and ``scale = scaling_factor`` for all channels; with ``latents_mean`` and ``latents_std``,
    ``shift = latents_mean`` and ``scale = scaling_factor / latents_std``.

    Raises:
        DavaeError: an entry is invalid for that many channels, see :func:`check_channel_statistics`.
    """
    check_statistics(config)
    scale = torch.full((channels,), _number(config, "scaling_factor", 1.0))
    shift = torch.full((channels,), _number(config, "shift_factor", 0.0))
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        check_channel_statistics("latents_mean", mean, "latents_std", std, channels)
        shift = torch.tensor(mean, dtype=torch.float32).flatten()
        scale = scale / torch.tensor(std, dtype=torch.float32).flatten()
    return shift, scale


def to_scaled(latent: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``(z - shift) * scale`` of a raw latent ``[B, C, h, w]``; shift and scale ``[C]`` on any device.

    Raises:
        DavaeError: another number of channels.
    """
    return (latent - _of_channels(shift, latent)) * _of_channels(scale, latent)


def to_raw(latent: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``z / scale + shift``, the inverse of :func:`to_scaled`.

    Raises:
        DavaeError: another number of channels, or a scale of 0.
    """
    if not scale.all():
        raise DavaeError(f"the scale of channel {int((scale == 0).nonzero()[0])} is 0 and cannot be inverted")
    return latent / _of_channels(scale, latent) + _of_channels(shift, latent)


def _of_channels(values: Tensor, latent: Tensor) -> Tensor | float:
    """A Python float if all channels share the value, which half precision does not round; else ``[C, 1, 1]``."""
    if len(values) != latent.shape[1]:
        raise DavaeError(f"the latent has {latent.shape[1]} channels, its shift and scale {len(values)}")
    return float(values[0]) if (values == values[0]).all() else values.to(latent)[:, None, None]


def _number(config: Mapping[str, Any], name: str, default: float) -> float:
    value = config.get(name)
    return default if value is None else float(value)
