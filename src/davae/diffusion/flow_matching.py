"""Flow matching: the straight path between data and noise, its velocity, and guidance.

The convention: ``x_sigma = (1 - sigma) data + sigma noise``, so that 0 is data and 1 is noise, and the velocity is
``dx / dsigma = noise - data``, as in diffusers' schedulers. A transformer with another sign or time is converted only
where it is called (by its family in `davae.pipelines.families`).

    >>> import torch
    >>> data, noise, sigma = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([0.25])
    >>> x_sigma, velocity = interpolate(data, noise, sigma), velocity_of(data, noise)
    >>> x_sigma, velocity
    (tensor([[1.2500]]), tensor([[-3.]]))
    >>> x0_from_velocity(velocity, x_sigma, sigma), noise_from_velocity(velocity, x_sigma, sigma)
    (tensor([[2.]]), tensor([[-1.]]))
"""

import math

import torch
from torch import Tensor

from davae.errors import DavaeError

# t = 1 - sigma, and sigma is float32: a time that should equal a bound may miss it by rounding.
_ROUNDING = 1e-6


def interpolate(data: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The point ``x_sigma = (1 - sigma) data + sigma noise`` of the path.

    Args:
        data: clean latents, [B, ...].
        noise: the same shape.
        sigma: noise level in [0, 1], [B] or one for all. Values outside extrapolate; they are not checked, because
            reading them would synchronise with the device.

    Raises:
        DavaeError: the shapes differ, or the number of sigmas is neither 1 nor the batch size.
    """
    _check_shapes(noise, data)
    sigma = per_sample(sigma, data)
    return (1 - sigma) * data + sigma * noise


def velocity_of(data: Tensor, noise: Tensor) -> Tensor:
    """The path's velocity ``noise - data``, the same at every sigma: the model's training target.

    Raises:
        DavaeError: the shapes differ.
    """
    _check_shapes(noise, data)
    return noise - data


def x0_from_velocity(velocity: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """The data that a velocity implies, ``x0_hat = x_sigma - sigma velocity``, float32.

    Args:
        velocity: predicted ``noise - data``, [B, ...].
        noisy: ``x_sigma``, the same shape.
        sigma: noise level in [0, 1], [B] or one for all.

    Raises:
        DavaeError: as :func:`interpolate`.
    """
    _check_shapes(velocity, noisy)
    return noisy.float() - per_sample(sigma, noisy) * velocity.float()


def noise_from_velocity(velocity: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """The noise that a velocity implies, ``x_sigma + (1 - sigma) velocity``, float32; see `x0_from_velocity`."""
    _check_shapes(velocity, noisy)
    return noisy.float() + (1 - per_sample(sigma, noisy)) * velocity.float()


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Classifier-free guidance ``uncond + scale * (cond - uncond)``: Ho and Salimans 2022, arXiv 2207.12598.

    Args:
        conditional: velocity for the wanted label, [B, C, h, w].
        unconditional: velocity for the null label, [B, C, h, w].
        scale: 1 gives the conditional velocity; larger values follow the label more closely.
        channels: guide only the first so many channels and leave the others conditional; None guides all.
            LightningDiT's official sampler guides three.

    Raises:
        DavaeError: shapes differ, the scale is not finite, or `channels` exceeds their number.
    """
    _check_shapes(unconditional, conditional)
    if not math.isfinite(scale):
        raise DavaeError(f"the guidance scale must be finite, not {scale}")
    if channels is not None and not 0 <= channels <= conditional.shape[1]:
        raise DavaeError(f"guidance of {channels} channels was asked for, but there are {conditional.shape[1]}")
    guided = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return guided
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def is_guided(t: float, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at ``t = 1 - sigma``: ``start <= t <= end``, both bounds included.

    Raises:
        DavaeError: the interval ends before it starts.
    """
    start, end = interval
    if not start <= end:
        raise DavaeError(f"the guidance interval from {start} to {end} ends before it starts")
    return start - _ROUNDING <= t <= end + _ROUNDING


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """One value per sample, [B], or one for all, as float32 [B or 1, 1, ...] that broadcasts with `like` [B, ...].

    Raises:
        DavaeError: another number of values.
    """
    if values.numel() not in (1, like.shape[0]):
        raise DavaeError(f"{values.numel()} values were given for {like.shape[0]} samples")
    return values.to(like.device, torch.float32).reshape(-1, *[1] * (like.ndim - 1))


def _check_shapes(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise DavaeError(f"the tensors must have the same shape, not {tuple(one.shape)} and {tuple(other.shape)}")
