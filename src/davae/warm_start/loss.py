"""The diffusion loss on a structured latent (Eq. 13) and the official code's variants of it.

Everything is computed in float32 whatever the dtype of the prediction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.choices import LossForm, check_choice
from davae.errors import DavaeError
from davae.latents import LatentLayout

Reduction = Literal["mean", "none"]


def structured_loss(
    prediction: Tensor,
    target: Tensor,
    layout: LatentLayout,
    weight: float,
    *,
    reduction: Reduction = "mean",
) -> Tensor:
    """Eq. 13: ``(|u_hat - u|^2 + w |u_hat_d - u_d|^2) / (|B| + w |R|)`` per sample, then their mean.

    ``|B| = C h w`` and ``|R| = D h w`` count the base and detail elements of a sample, so the loss is a mean
    squared error at every weight, and the plain one at weight 1.

    Args:
        prediction: [B, C + D, h, w], base first.
        target: the same shape.
        layout: base and detail channels.
        weight: ``w(n)``, see `detail_weight`; at least 0.
        reduction: ``"mean"`` over samples, or ``"none"``.

    Returns:
        float32 scalar, or [B] with ``"none"``.

    Raises:
        DavaeError: shapes differ, another number of channels, or a negative weight.
    """
    _check_shapes(prediction, target)
    return _reduce(structured_mean((prediction.float() - target.float()).square(), layout, weight), reduction)


def structured_mean(errors: Tensor, layout: LatentLayout, weight: float) -> Tensor:
    """Eq. 13's mean over a sample's elements, detail channels counted ``weight`` times: ``[B, C + D, h, w]`` to [B].

    Raises:
        DavaeError: another number of channels, or a negative weight.
    """
    if not weight >= 0:
        raise DavaeError(f"the detail weight must not be negative, got {weight}")
    base, detail = layout.split(errors)  # [B, C, h, w], [B, D, h, w]
    weighted = base.flatten(1).sum(1) + weight * detail.flatten(1).sum(1)
    return weighted / (base[0].numel() + weight * detail[0].numel())


def cosine_loss(prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """``1 - cos`` of the angle over all channels, averaged over positions: LightningDiT's second term.

    It has no detail weight: in the official code it covers the detail channels from step 0.

    Args:
        prediction: [B, C, h, w].
        target: the same shape.
        reduction: ``"mean"`` over samples, or ``"none"``.

    Returns:
        float32 scalar, or [B] with ``"none"``.
    """
    _check_shapes(prediction, target)
    similarity = F.cosine_similarity(prediction.float(), target.float(), dim=1)  # [B, h, w]
    return _reduce((1 - similarity).flatten(1).mean(1), reduction)


def predicted_data(velocity: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
    """``x_0 = x_sigma - sigma (noise - data)`` for a predicted ``noise - data``.

    Args:
        velocity: predicted ``noise - data``, [B, ...].
        noisy: ``x_sigma = (1 - sigma) data + sigma noise``, the same shape.
        sigma: share of noise in [0, 1], [B].
    """
    return noisy.float() - _per_sample(sigma, noisy) * velocity.float()


def min_snr_weight(noise_share: Tensor, gamma: float) -> Tensor:
    """``min((1 - t) / t, gamma)``: keeps nearly clean samples from ruling the data form of the loss.

    Args:
        noise_share: ``t`` in [0, 1], any shape. The official code takes the truncated timestep over 1000.
        gamma: the cap, 5 in the official code; also the weight at ``t = 0``.
    """
    if not gamma > 0:
        raise DavaeError(f"gamma must be positive, got {gamma}")
    t = noise_share.float()
    return ((1 - t) / t).clamp(max=gamma)  # 1 / 0 is infinite, and capped


@dataclass(frozen=True)
class FlowLoss:
    """The loss of the diffusion stage: Eq. 13 by default, the official code's variants by name.

    The ImageNet code adds the cosine term (``cosine_weight=1``); the SD3 code compares data instead of
    velocities and weights samples (``form="x0", min_snr_gamma=5``).

    Attributes:
        layout: base and detail channels.
        form: ``"velocity"`` compares ``noise - data``; ``"x0"`` the data it implies, that is ``sigma^2``
            times the velocity's error.
        min_snr_gamma: weight samples by `min_snr_weight`, or not.
        cosine_weight: weight of `cosine_loss` on the velocity, not scheduled.
    """

    layout: LatentLayout
    form: LossForm = "velocity"
    min_snr_gamma: float | None = None
    cosine_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.form, LossForm, "loss form")
        if not self.cosine_weight >= 0:
            raise DavaeError(f"cosine_weight must not be negative, got {self.cosine_weight}")

    def __call__(
        self,
        velocity: Tensor,
        *,
        data: Tensor,
        noise: Tensor,
        sigma: Tensor,
        weight: float,
        noise_share: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The loss of a predicted velocity.

        Args:
            velocity: predicted ``noise - data``, [B, C + D, h, w]. A model that predicts ``data - noise``
                (LightningDiT) is negated before.
            data: clean structured latent, the same shape.
            noise: Gaussian noise, the same shape.
            sigma: share of noise of each sample, [B].
            weight: detail weight ``w(n)``.
            noise_share: ``t`` of the min-SNR weight where it is not `sigma` itself, [B].
            reduction: ``"mean"`` over samples, or ``"none"``.

        Returns:
            float32 scalar, or [B] with ``"none"``.
        """
        data, noise, sigma = data.float(), noise.float(), sigma.float()
        if self.form == "velocity":
            prediction, target = velocity, noise - data
        else:
            noisy = torch.lerp(data, noise, _per_sample(sigma, data))
            prediction, target = predicted_data(velocity, noisy, sigma), data
        loss = structured_loss(prediction, target, self.layout, weight, reduction="none")  # [B]
        if self.cosine_weight:
            loss = loss + self.cosine_weight * cosine_loss(velocity, noise - data, reduction="none")
        if self.min_snr_gamma is not None:
            loss = loss * min_snr_weight(sigma if noise_share is None else noise_share, self.min_snr_gamma)
        return _reduce(loss, reduction)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    # [B] -> [B, 1, 1, 1], float32, on the device of the latents
    return values.to(like.device, torch.float32).reshape(-1, *[1] * (like.ndim - 1))


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise DavaeError(
            f"the prediction has shape {tuple(prediction.shape)}, the target {tuple(target.shape)}"
        )


def _reduce(per_sample: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise DavaeError(f"unknown reduction '{reduction}': use mean or none")
    return per_sample.mean() if reduction == "mean" else per_sample
