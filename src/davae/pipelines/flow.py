"""Flow matching: the straight path between noise and data, guidance, and the timestep shift.

One convention everywhere: ``t = 0`` is noise, ``t = 1`` is data, and a model predicts the velocity
``u = data - noise``. The schedulers of diffusers count the other way, ``sigma = 1 - t`` and ``noise - data``;
:func:`sigma_velocity` and :func:`sigma_shift` are the two places where that matters.
"""

from __future__ import annotations

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

# sigma is float32 and t = 1 - sigma, so a time that should equal a bound may miss it by rounding.
_ROUNDING = 1e-6


def path_point(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Point of the straight path ``x_t = t * data + (1 - t) * noise``.

    Args:
        data: [B, C, h, w].
        noise: [B, C, h, w].
        t: times in [0, 1], [B].
    """
    t = t.view(-1, *[1] * (data.ndim - 1)).to(data.dtype)
    return t * data + (1 - t) * noise


def path_velocity(data: Tensor, noise: Tensor) -> Tensor:
    """The path's velocity ``data - noise``, the same at every t: what a model learns to predict."""
    return data - noise


def sigma_velocity(velocity: Tensor) -> Tensor:
    """From ``data - noise`` to the ``noise - data`` of diffusers' schedulers, and back: d sigma = -dt."""
    return -velocity


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Warp times, ``s t / (1 + (s - 1) t)``; 0 and 1 stay. A shift below 1 brings times nearer to noise."""
    return shift * t / (1 + (shift - 1) * t)


def sigma_shift(shift: float) -> float:
    """The scheduler's `shift`, in ``sigma = 1 - t``, that warps as `shift` does in t: its reciprocal."""
    return 1 / shift


def guide(conditional: Tensor, unconditional: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Classifier-free guidance ``uncond + scale * (cond - uncond)``: Ho and Salimans 2022, arXiv 2207.12598.

    Args:
        conditional: velocity for the wanted label, [B, C, h, w].
        unconditional: velocity for the null label, [B, C, h, w].
        scale: 1 changes nothing, more follows the label more closely.
        channels: guide this many first channels and leave the others conditional; None guides all.
            LightningDiT's own sampler guides three.
    """
    guided = unconditional + scale * (conditional - unconditional)
    if channels is None:
        return guided
    return torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def is_guided(t: float, interval: tuple[float, float]) -> bool:
    """Whether guidance acts at time `t`: ``start <= t <= end``, both bounds included."""
    start, end = interval
    return start - _ROUNDING <= t <= end + _ROUNDING


def predict_velocity(
    transformer: ModelMixin,
    latents: Tensor,
    t: float,
    class_labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
) -> Tensor:
    """Guided velocity ``data - noise`` of a class-conditional transformer at one time, in float32.

    Where guidance acts, both predictions come from one pass over a doubled batch; elsewhere the label's own
    prediction is all that is computed.

    Args:
        transformer: called as ``transformer(latents, timestep, class_labels).sample``, with
            ``config.num_classes`` as its null label.
        latents: x_t, [B, C, h, w].
        t: time in [0, 1], the same for all.
        class_labels: [B] int64.
        guidance_scale: see :func:`guide`.
        guidance_interval: see :func:`is_guided`.
        guidance_channels: see :func:`guide`.
    """
    guided = guidance_scale != 1 and is_guided(t, guidance_interval)
    if guided:
        latents = torch.cat([latents, latents])
        null_labels = torch.full_like(class_labels, transformer.config.num_classes)
        class_labels = torch.cat([class_labels, null_labels])
    times = torch.full((len(latents),), t, dtype=torch.float32, device=latents.device)
    velocity = transformer(latents, timestep=times, class_labels=class_labels).sample.float()
    if not guided:
        return velocity
    conditional, unconditional = velocity.chunk(2)
    return guide(conditional, unconditional, guidance_scale, guidance_channels)
