"""The two noise processes with their training targets: flow matching and DDPM.

>>> process = FlowProcess(FlowLoss(LatentLayout(base_channels=1, detail_channels=3)))
>>> sample = process.draw(torch.randn(2, 4, 8, 8))
>>> sample.noisy.shape, sample.sigma.shape
(torch.Size([2, 4, 8, 8]), torch.Size([2]))
>>> process.loss(sample.target, sample, weight=0.5)  # the true velocity
tensor(0.)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from davae.diffusion.flow_matching import interpolate, velocity_of
from davae.diffusion.loss import FlowLoss, check_terms, cosine_loss, structured_loss, structured_mean
from davae.diffusion.timesteps import Scheme, SigmaTable, sample_sigmas, sample_unit
from davae.diffusion.variational_bound import VariationalBound
from davae.errors import DavaeError
from davae.latents import LatentLayout

# The entries of a scheduler's configuration that define its betas.
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")


@dataclass(frozen=True)
class NoisySample:
    """A batch of latents with added noise.

    Attributes:
        data: clean latents, [B, C + D, h, w].
        noise: standard normal, the same shape.
        noisy: the mixture, the same shape.
        sigma_or_t: the time given to the transformer's family, [B]: sigma, or the integer timestep (DDPM).
        sigma: the coefficient of the noise in the mixture, in [0, 1], [B].
        target: the velocity or the noise, the same shape as the data.
        kept: [B, C + D, 1, 1], 1 for the channels that a sample is restricted to, and 0 for others; None for all.
    """

    data: Tensor
    noise: Tensor
    noisy: Tensor
    sigma_or_t: Tensor
    sigma: Tensor
    target: Tensor
    kept: Tensor | None = None

    def restricted(self, kept: Tensor) -> NoisySample:
        """The sample cut to some channels, where the others are 0: a convolution or linear layer over channels sees
        what it would see of the kept ones alone. Their prediction is to be multiplied by ``kept`` too.
        """
        cut = {name: getattr(self, name) * kept for name in ("data", "noise", "noisy", "target")}
        return replace(self, **cut, kept=kept)


class NoiseProcess(ABC):
    """Draws noisy samples and computes the loss of a prediction on them."""

    @abstractmethod
    def draw(self, data: Tensor) -> NoisySample:
        """Add noise to a batch ``[B, C + D, h, w]``; levels, then noise, come from torch's global generators."""

    @abstractmethod
    def distilled(self, sample: NoisySample, teacher: Tensor, share: float) -> NoisySample:
        """The sample whose base channels are to be predicted as a teacher does.

        Their target ``u`` becomes ``(1 - share) u + share teacher``, which for a squared error has the gradient of the
        same mixture of two losses; data and noise become those that this target implies in the noisy latent.

        Args:
            sample: of all channels, as drawn.
            teacher: the frozen base's prediction for the noisy base channels, [B, C, h, w].
            share: in [0, 1].
        """

    @abstractmethod
    def loss(self, prediction: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """The training loss, a float32 scalar; ``weight`` is ``w(n)`` of Eq. 12."""

    def variance_loss(self, prediction: Tensor, variance: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """The loss of a learned variance, a float32 scalar.

        Raises:
            DavaeError: the process has no learned variance.
        """
        raise DavaeError("flow matching has no loss for a learned variance: set loss.variance_weight=0")


class FlowProcess(NoiseProcess):
    """``x_sigma = (1 - sigma) data + sigma noise``, target: the velocity ``noise - data``.

    Args:
        measure: Eq. 13 in the chosen form.
        scheme: distribution of sigma before the shift, see `sample_unit`.
        mean: of the logits.
        std: of the logits.
        shift: gives the shift of sigma for a latent [B, C + D, h, w].
        table: take levels from it instead of shifting; the transformer gets the truncated timestep over 1000.
    """

    def __init__(
        self,
        measure: FlowLoss,
        *,
        scheme: Scheme = "logit_normal",
        mean: float = 0.0,
        std: float = 1.0,
        shift: Callable[[Tensor], float] = lambda latent: 1.0,
        table: SigmaTable | None = None,
    ) -> None:
        self.measure, self.shift, self.table = measure, shift, table
        self.drawn: dict[str, Any] = {"scheme": scheme, "mean": mean, "std": std}

    def draw(self, data: Tensor) -> NoisySample:
        """Noise levels by the scheme, then Gaussian noise."""
        sigma, sigma_or_t = (v.to(data.device) for v in self._levels(data))
        noise = torch.randn_like(data)
        noisy = interpolate(data, noise, sigma)
        return NoisySample(data, noise, noisy, sigma_or_t, sigma, velocity_of(data, noise))

    def _levels(self, data: Tensor) -> tuple[Tensor, Tensor]:
        if self.table is not None:
            sigma, timesteps = self.table.look_up(sample_unit(len(data), **self.drawn))
            return sigma, timesteps / 1000
        sigma = sample_sigmas(len(data), **self.drawn, shift=self.shift(data))
        return sigma, sigma

    def distilled(self, sample: NoisySample, teacher: Tensor, share: float) -> NoisySample:  # noqa: D102
        target = _towards(sample.target, teacher, share)
        data = sample.noisy - sample.sigma.view(-1, 1, 1, 1) * target
        return replace(sample, data=data, noise=data + target, target=target)

    def loss(self, prediction: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """Eq. 13 in the chosen form; the min-SNR weight uses the level given to the transformer."""
        return self.measure(
            prediction,
            data=sample.data,
            noise=sample.noise,
            sigma=sample.sigma,
            weight=weight,
            noise_share=sample.sigma_or_t,
            kept=sample.kept,
        )


class DdpmProcess(NoiseProcess):
    """``x_t = sqrt(a_t) data + sqrt(1 - a_t) noise`` at an integer timestep, target: the noise.

    ``a_t`` is the cumulative product of ``1 - beta`` from the pipeline's own scheduler; timesteps are uniform, as
    these models were trained. Eq. 13 applies to the error of the predicted noise, and to the variational bound of
    a learned variance (`VariationalBound`): together the objective of DiT.

    Args:
        layout: base and detail channels.
        scheduler: configuration of the pipeline's scheduler.
        min_snr_gamma: weight samples by ``min(SNR, gamma) / SNR``; None for no weighting.
        cosine_weight: weight of `cosine_loss` on the noise, the same at every step.

    Raises:
        DavaeError: the scheduler's prediction is not the noise, or a weight or cap cannot be used.
    """

    def __init__(
        self,
        layout: LatentLayout,
        scheduler: Mapping[str, Any],
        *,
        min_snr_gamma: float | None = None,
        cosine_weight: float = 0.0,
    ) -> None:
        predicted = scheduler.get("prediction_type", "epsilon")
        if predicted != "epsilon":
            raise DavaeError(f"the scheduler predicts '{predicted}': only noise (epsilon) can be trained")
        names = ("num_train_timesteps", *_BETAS)
        known = {name: scheduler[name] for name in names if scheduler.get(name) is not None}
        self.alphas_cumprod = DDPMScheduler(**known).alphas_cumprod  # a_t, float32 [T], decreasing
        check_terms(min_snr_gamma, cosine_weight)
        self.layout, self.min_snr_gamma, self.cosine_weight = layout, min_snr_gamma, cosine_weight

    @cached_property
    def bound(self) -> VariationalBound:
        """The bound of a learned variance; undefined for a schedule that ends in pure noise."""
        return VariationalBound(self.alphas_cumprod)

    def draw(self, data: Tensor) -> NoisySample:
        """A uniform timestep for each sample, then noise."""
        t = torch.randint(len(self.alphas_cumprod), (len(data),))
        a = self.alphas_cumprod[t].to(data.device, data.dtype).view(-1, 1, 1, 1)
        noise = torch.randn_like(data)
        alpha, sigma = a.sqrt(), (1 - a).sqrt()
        noisy = alpha * data + sigma * noise
        return NoisySample(data, noise, noisy, t.to(data.device), sigma.flatten(), noise)

    def distilled(self, sample: NoisySample, teacher: Tensor, share: float) -> NoisySample:  # noqa: D102
        noise = _towards(sample.target, teacher, share)
        sigma = sample.sigma.view(-1, 1, 1, 1)
        data = (sample.noisy - sigma * noise) / (1 - sigma.square()).sqrt()
        return replace(sample, data=data, noise=noise, target=noise)

    def loss(self, prediction: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """Eq. 13 on the noise; with a min-SNR cap samples are weighted by ``min(SNR, gamma) / SNR``."""
        target, kept = sample.target, sample.kept
        loss = structured_loss(prediction, target, self.layout, weight, kept=kept, reduction="none")  # [B]
        if self.cosine_weight:
            loss = loss + self.cosine_weight * cosine_loss(prediction, target, reduction="none")
        if self.min_snr_gamma is not None:
            t = sample.sigma_or_t
            a = self.alphas_cumprod.to(t.device)[t]
            snr = a / (1 - a)
            loss = loss * (self.min_snr_gamma / snr).clamp(max=1)
        return loss.mean()

    def variance_loss(self, prediction: Tensor, variance: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """The variational bound in bits per element, detail channels weighted as in Eq. 13."""
        t = sample.sigma_or_t
        terms = self.bound(prediction, variance, data=sample.data, noisy=sample.noisy, timestep=t)
        return structured_mean(terms, self.layout, weight, sample.kept).mean()


def _towards(target: Tensor, teacher: Tensor, share: float) -> Tensor:
    """A target ``[B, C + D, h, w]`` whose first channels go towards a teacher's prediction of them."""
    base, detail = target.split([teacher.shape[1], target.shape[1] - teacher.shape[1]], dim=1)
    return torch.cat([base.lerp(teacher.to(base.dtype), share), detail], dim=1)
