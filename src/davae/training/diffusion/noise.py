"""The two ways of adding noise and what the transformer learns to predict: flow matching and DDPM."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.pipelines.families import PipelineFamily
from davae.recipes.settings import FlowLossSettings, TimestepSettings
from davae.training.diffusion.variational import VariationalBound
from davae.warm_start import (
    FlowLoss,
    cosine_loss,
    sample_sigmas,
    sample_unit,
    sd3_sigma_table,
    structured_loss,
    structured_mean,
)


@dataclass(frozen=True)
class NoisySample:
    """Latents on their way to noise.

    Attributes:
        data: clean latents, [B, C + D, h, w].
        noise: standard normal, the same shape.
        noisy: the mixture, the same shape.
        level: what the family's ``predict`` takes, [B]: sigma, or the timestep.
        share: sigma (flow), or the share of noise in the variance (DDPM), [B].
        target: what the prediction is compared with, the same shape as the data.
    """

    data: Tensor
    noise: Tensor
    noisy: Tensor
    level: Tensor
    share: Tensor
    target: Tensor


class NoiseProcess(ABC):
    """Draws noisy samples, and measures a prediction on them."""

    @abstractmethod
    def draw(self, data: Tensor) -> NoisySample:
        """Noise for a batch ``[B, C + D, h, w]``: first the levels, then the noise, from torch's own state."""

    @abstractmethod
    def loss(self, prediction: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """The training loss, a float32 scalar; ``weight`` is ``w(n)`` of Eq. 12."""

    def variance_loss(
        self, prediction: Tensor, variance: Tensor, sample: NoisySample, weight: float
    ) -> Tensor:
        """The loss of a learned variance, a float32 scalar.

        Raises:
            DavaeError: the process knows none.
        """
        raise DavaeError("a learned variance beside a velocity is not known: set loss.variance_weight=0")


class FlowProcess(NoiseProcess):
    """``x = (1 - sigma) data + sigma noise``, target ``noise - data``.

    Args:
        layout: base and detail channels.
        loss: form and weights of the loss.
        timesteps: how sigma is drawn.
        shift: the shift for a latent, where ``timesteps`` names none.
    """

    def __init__(
        self,
        layout: LatentLayout,
        loss: FlowLossSettings,
        timesteps: TimestepSettings,
        shift: Callable[[Tensor], float] = lambda latent: 1.0,
    ) -> None:
        self.timesteps, self.shift = timesteps, shift
        self.measure = FlowLoss(
            layout, form=loss.form, min_snr_gamma=loss.min_snr_gamma, cosine_weight=loss.cosine_weight
        )
        table = timesteps.table
        self.table = (
            None if table is None else sd3_sigma_table(table.config_shift, table.train_shift, table.steps)
        )

    def draw(self, data: Tensor) -> NoisySample:
        """Levels of noise as the settings say, then noise."""
        sigma, level = (v.to(data.device) for v in self._levels(data))
        noise = torch.randn_like(data)
        share = sigma.view(-1, 1, 1, 1)
        noisy = (1 - share) * data + share * noise
        return NoisySample(data, noise, noisy, level, sigma, noise - data)

    def _levels(self, data: Tensor) -> tuple[Tensor, Tensor]:
        settings = self.timesteps
        drawn: dict[str, Any] = {
            "scheme": settings.scheme,
            "mean": settings.logit_mean,
            "std": settings.logit_std,
        }
        if self.table is not None:
            sigma, timesteps = self.table.look_up(sample_unit(len(data), **drawn))
            return sigma, timesteps / 1000  # the transformer is told the truncated time
        shift = settings.shift if settings.shift is not None else self.shift(data)
        sigma = sample_sigmas(len(data), **drawn, shift=shift)
        return sigma, sigma

    def loss(self, prediction: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """Eq. 13 in the chosen form; the min-SNR weight goes by the time that the transformer was told."""
        return self.measure(
            prediction,
            data=sample.data,
            noise=sample.noise,
            sigma=sample.share,
            weight=weight,
            noise_share=sample.level,
        )


class DdpmProcess(NoiseProcess):
    """``x = sqrt(a) data + sqrt(1 - a) noise`` at an integer timestep, target: the noise.

    ``a`` is the cumulative product of ``1 - beta`` from the pipeline's own scheduler; timesteps are uniform, as
    these models were trained. Eq. 13 applies to the error of the predicted noise, and to the variational bound of
    a learned variance (`VariationalBound`): together the objective of DiT.

    Args:
        layout: base and detail channels.
        loss: weights of the loss; the form must be the usual one.
        scheduler: configuration of the pipeline's scheduler.

    Raises:
        DavaeError: the scheduler's prediction is not the noise, or the loss asks for a form of flow matching.
    """

    def __init__(self, layout: LatentLayout, loss: FlowLossSettings, scheduler: Mapping[str, Any]) -> None:
        predicted = scheduler.get("prediction_type", "epsilon")
        if predicted != "epsilon":
            raise DavaeError(f"the scheduler predicts '{predicted}': only noise (epsilon) can be trained")
        if loss.form != "velocity":
            raise DavaeError(f"loss.form={loss.form} is for flow matching; this pipeline predicts noise")
        names = (
            "num_train_timesteps",
            "beta_start",
            "beta_end",
            "beta_schedule",
            "trained_betas",
            "rescale_betas_zero_snr",
        )
        known = {name: scheduler[name] for name in names if scheduler.get(name) is not None}
        self.kept = DDPMScheduler(**known).alphas_cumprod  # a_t, float32 [T], falling
        self.bound = VariationalBound(self.kept)
        self.layout, self.settings = layout, loss

    def draw(self, data: Tensor) -> NoisySample:
        """A uniform timestep for each sample, then noise."""
        timestep = torch.randint(len(self.kept), (len(data),))
        kept = self.kept[timestep].to(data.device)
        noise = torch.randn_like(data)
        a = kept.view(-1, 1, 1, 1).to(data.dtype)
        noisy = a.sqrt() * data + (1 - a).sqrt() * noise
        return NoisySample(data, noise, noisy, timestep.to(data.device), 1 - kept, noise)

    def loss(self, prediction: Tensor, sample: NoisySample, weight: float) -> Tensor:
        """Eq. 13 on the noise; with a min-SNR cap samples are weighted by ``min(SNR, gamma) / SNR``."""
        loss = structured_loss(prediction, sample.target, self.layout, weight, reduction="none")  # [B]
        if self.settings.cosine_weight:
            cosine = cosine_loss(prediction, sample.target, reduction="none")
            loss = loss + self.settings.cosine_weight * cosine
        if self.settings.min_snr_gamma is not None:
            snr = (1 - sample.share) / sample.share
            loss = loss * (self.settings.min_snr_gamma / snr).clamp(max=1)
        return loss.mean()

    def variance_loss(
        self, prediction: Tensor, variance: Tensor, sample: NoisySample, weight: float
    ) -> Tensor:
        """The variational bound in bits an element, detail channels weighted as in Eq. 13."""
        terms = self.bound(prediction, variance, data=sample.data, noisy=sample.noisy, timestep=sample.level)
        return structured_mean(terms, self.layout, weight).mean()


def noise_process(
    family: PipelineFamily,
    pipe: DiffusionPipeline,
    layout: LatentLayout,
    loss: FlowLossSettings,
    timesteps: TimestepSettings,
) -> NoiseProcess:
    """The process that a pipeline's transformer was trained with."""
    if family.kind == "ddpm":
        return DdpmProcess(layout, loss, pipe.scheduler.config)
    return FlowProcess(
        layout,
        loss,
        timesteps,
        lambda latent: family.timestep_shift(pipe, family.tokens(pipe.transformer, latent)),
    )
