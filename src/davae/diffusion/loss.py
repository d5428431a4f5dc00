"""The diffusion loss on a structured latent (Eq. 13) and the official code's variants of it.

Everything is computed in float32 whatever the dtype of the prediction. One base channel off by 2, three detail channels
off by 1, the details at half weight: (4 + 0.5 * 3) / (1 + 0.5 * 3) = 2.2.

    >>> import torch
    >>> layout = LatentLayout(base_channels=1, detail_channels=3)
    >>> prediction = torch.tensor([2.0, 1.0, 1.0, 1.0]).view(1, 4, 1, 1)
    >>> structured_loss(prediction, torch.zeros(1, 4, 1, 1), layout, weight=0.5)
    tensor(2.2000)
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.choices import LossForm, check_choice
from davae.diffusion.flow_matching import per_sample, velocity_of, x0_from_velocity
from davae.errors import DavaeError
from davae.latents import LatentLayout

Reduction = Literal["mean", "none"]


def structured_loss(
    prediction: Tensor,
    target: Tensor,
    layout: LatentLayout,
    weight: float,
    *,
    kept: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Eq. 13: ``(|u_hat - u|^2 + w |u_hat_d - u_d|^2) / (|B| + w |R|)`` per sample, then their mean.

    ``|B| = C h w`` and ``|R| = D h w`` count the base and detail elements of a sample, so the loss is a weighted
    mean squared error, and at weight 1 the plain one.

    Args:
        prediction: [B, C + D, h, w], base first.
        target: the same shape.
        layout: base and detail channels.
        weight: ``w(n)``, see `detail_weight`; at least 0.
        kept: see `structured_mean`.
        reduction: ``"mean"`` over samples, or ``"none"``.

    Returns:
        float32 scalar, or [B] with ``"none"``.

    Raises:
        DavaeError: shapes differ, another number of channels, or a weight that is negative or not finite.
    """
    _check_shapes(prediction, target)
    return _reduce(structured_mean((prediction.float() - target.float()).square(), layout, weight, kept), reduction)


def structured_mean(errors: Tensor, layout: LatentLayout, weight: float, kept: Tensor | None = None) -> Tensor:
    """Eq. 13's mean over a sample's elements, detail channels counted ``weight`` times: ``[B, C + D, h, w]`` to [B].

    Args:
        errors: of each element.
        layout: base and detail channels.
        weight: of the detail channels.
        kept: ``[B, C + D, 1, 1]``, 1 for channels that count, among them a base channel of every sample, and 0 for
            others (`davae.latents.prefixes.prefix_mask`); None counts all.

    Raises:
        DavaeError: another number of channels, or a weight that is negative or not finite.
    """
    if not 0 <= weight < math.inf:
        raise DavaeError(f"the detail weight must be finite and not negative, got {weight}")
    base, detail = layout.split(errors if kept is None else errors * kept)  # [B, C, h, w], [B, D, h, w]
    weighted = base.flatten(1).sum(1) + weight * detail.flatten(1).sum(1)
    if kept is None:
        return weighted / (base[0].numel() + weight * detail[0].numel())
    of_base, of_detail = (part.sum((1, 2, 3)) * errors[0, 0].numel() for part in layout.split(kept))
    return weighted / (of_base + weight * of_detail)


def cosine_loss(prediction: Tensor, target: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    """``1 - cos`` of the angle between the channel vectors, averaged over positions: LightningDiT's second term.

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


def min_snr_weight(noise_share: Tensor, gamma: float) -> Tensor:
    """``min((1 - t) / t, gamma)``: the official code's weight, which bounds that of nearly clean samples.

    Args:
        noise_share: ``t`` in [0, 1], any shape; values outside are clamped. The official code takes the
            truncated timestep divided by 1000.
        gamma: the cap, 5 in the official code; also the weight at ``t = 0``.

    Raises:
        DavaeError: ``gamma`` is not finite and above 0.
    """
    _check_gamma(gamma)
    t = noise_share.float().clamp(0, 1)
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
        min_snr_gamma: cap of `min_snr_weight`; None for no weighting.
        cosine_weight: weight of `cosine_loss` on the velocity, the same at every step.
    """

    layout: LatentLayout
    form: LossForm = "velocity"
    min_snr_gamma: float | None = None
    cosine_weight: float = 0.0

    def __post_init__(self) -> None:
        check_choice(self.form, LossForm, "loss form")
        check_terms(self.min_snr_gamma, self.cosine_weight)

    def __call__(
        self,
        velocity: Tensor,
        *,
        data: Tensor,
        noise: Tensor,
        sigma: Tensor,
        weight: float,
        noise_share: Tensor | None = None,
        kept: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """The loss of a predicted velocity.

        Args:
            velocity: predicted ``noise - data``, [B, C + D, h, w].
            data: clean structured latent, the same shape.
            noise: Gaussian noise, the same shape.
            sigma: noise level of each sample, [B].
            weight: detail weight ``w(n)``.
            noise_share: ``t`` of the min-SNR weight, [B]; None for `sigma`.
            kept: channels that count, see `structured_mean`; the others are 0 in all three latents.
            reduction: ``"mean"`` over samples, or ``"none"``.

        Returns:
            float32 scalar, or [B] with ``"none"``.
        """
        data, noise, sigma = data.float(), noise.float(), sigma.float()
        prediction, target = velocity, velocity_of(data, noise)
        if self.form == "x0":
            noisy = torch.lerp(data, noise, per_sample(sigma, data))  # x_sigma
            prediction, target = x0_from_velocity(velocity, noisy, sigma), data
        loss = structured_loss(prediction, target, self.layout, weight, kept=kept, reduction="none")  # [B]
        if self.cosine_weight:
            cosine = cosine_loss(velocity, velocity_of(data, noise), reduction="none")
            loss = loss + self.cosine_weight * cosine
        if self.min_snr_gamma is not None:
            loss = loss * min_snr_weight(sigma if noise_share is None else noise_share, self.min_snr_gamma)
        return _reduce(loss, reduction)


def check_terms(min_snr_gamma: float | None, cosine_weight: float) -> None:
    """Check the settings of the loss's additional terms.

    Raises:
        DavaeError: a weight that is negative or not finite, or a cap that is not finite and above 0.
    """
    if not 0 <= cosine_weight < math.inf:
        raise DavaeError(f"cosine_weight must be finite and not negative, got {cosine_weight}")
    if min_snr_gamma is not None:
        _check_gamma(min_snr_gamma)


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma < math.inf:
        raise DavaeError(f"gamma must be positive and finite, got {gamma}")


def _check_shapes(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise DavaeError(f"the prediction has shape {tuple(prediction.shape)}, the target {tuple(target.shape)}")


def _reduce(per_sample: Tensor, reduction: Reduction) -> Tensor:
    if reduction not in ("mean", "none"):
        raise DavaeError(f"unknown reduction '{reduction}': use mean or none")
    return per_sample.mean() if reduction == "mean" else per_sample
