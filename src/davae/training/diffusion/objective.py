"""The loss of the diffusion stage, and the noise process that a pipeline's transformer is trained with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from davae.diffusion.detail_schedule import detail_weight
from davae.diffusion.loss import FlowLoss
from davae.diffusion.noise import DdpmProcess, FlowProcess, NoiseProcess, NoisySample
from davae.diffusion.timesteps import sd3_sigma_table
from davae.errors import DavaeError
from davae.latents import ChannelPrefixes, LatentLayout
from davae.pipelines.families import ClassFamily, PipelineFamily
from davae.recipes.settings import FlowLossSettings, TimestepSettings
from davae.training.loop.rng import drawing


class DiffusionObjective(nn.Module):
    """The training loss: add noise, predict, and weight the error of base and detail channels by Eq. 12 and 13.

    Random draws of a step are, in this order: noise levels, noise, prefixes of channels, and which prompts or labels
    are dropped. They do not depend on whether latents and embeddings come from a cache, and the transformer itself
    draws nothing. Prefixes are drawn in training only: of a sample that gets one, the transformer sees the prefix
    beside zeros, and its loss is that of the prefix.

    Args:
        family: how the transformer is called.
        transformer: the (widened) transformer.
        layout: which channels are base and which are detail; no detail channels for a base model.
        process: how noise is added and the prediction's error measured.
        loss: the recipe's section, with the schedule of the detail weight.
        encode: images to latents, for batches with images.
        unconditional: the empty prompt's conditioning, as a batch of 1; needed for prompt dropout.
        dropout: probability of training a sample with the empty prompt, in [0, 1].
        guidance: guidance scale passed to guidance-distilled transformers.
        teacher: the base's transformer before it was widened, for ``loss.base_distillation``; it is no part of this
            module, and its weights are neither trained nor saved.

    Raises:
        DavaeError: a prefix of channels is not shorter than the latent.
    """

    def __init__(
        self,
        family: PipelineFamily,
        transformer: nn.Module,
        layout: LatentLayout,
        process: NoiseProcess,
        loss: FlowLossSettings,
        *,
        encode: Callable[[Tensor], Tensor] | None = None,
        unconditional: Mapping[str, Tensor] | None = None,
        dropout: float = 0.0,
        guidance: float = 3.5,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.family, self.process, self.encode = family, process, encode
        self.transformer = transformer
        self.layout, self.settings = layout, loss
        self.prefixes = channel_prefixes(loss, layout.channels)
        self.dropout, self.guidance = dropout, guidance
        self.teacher = (teacher,)  # a tuple hides it from torch
        for name, value in (unconditional or {}).items():
            # A buffer moves with the module; a non-persistent one stays out of checkpoints.
            self.register_buffer(f"unconditional_{name}", value, persistent=False)

    def train(self, mode: bool = True) -> "DiffusionObjective":
        """As in torch, but labels are dropped here and not once more in the transformer."""
        super().train(mode)
        if isinstance(self.family, ClassFamily):
            self.family.keep_labels(self.transformer)
        return self

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Named scalar losses of a batch: ``total``, for the log its parts, and the ``detail_weight`` of Eq. 12.

        Args:
            batch: ``latent`` ``[B, C + D, h, w]``, scaled for the transformer, or ``image`` ``[B, 3, H, W]``; and
                ``label`` ``[B]`` or ``conditioning``, for families conditioned on classes or text.
            step: optimizer step, for the schedule of the detail weight.
        """
        settings = self.settings
        if self.encode is not None and "image" in batch:
            data = self.encode(batch["image"])
        else:
            data = batch["latent"]

        with drawing():
            # Draws follow memory order: channels-last latents of an encoder would get other noise than cached ones.
            sample = self.process.draw(data.contiguous())
            prefixes = self.prefixes.draw(data) if self.training and self.prefixes else None
            conditioning = self._conditioning(batch)
        if self.training:
            sample = self._distilled(sample, conditioning)
        sample = sample if prefixes is None else sample.restricted(prefixes)
        prediction, variance = self.family.predict_with_variance(
            self.transformer, sample.noisy, sample.sigma_or_t, conditioning, guidance=self.guidance
        )

        if sample.kept is not None:
            prediction = prediction * sample.kept
        weight = detail_weight(step, int(settings.detail_warmup_steps), shape=settings.detail_schedule)  # Eq. 12
        loss = self.process.loss(prediction, sample, weight)  # Eq. 13
        logged: dict[str, Tensor] = {}
        if self.layout.detail_channels:
            logged = self._parts(prediction, sample)
        if variance is not None and settings.variance_weight:
            bound = self.process.variance_loss(prediction, variance, sample, weight)
            loss = loss + settings.variance_weight * bound
            logged["variance"] = bound.detach()
        return {"total": loss, **logged, "detail_weight": loss.new_tensor(weight)}

    @torch.no_grad()
    def _distilled(self, sample: NoisySample, conditioning: Mapping[str, Tensor]) -> NoisySample:
        """The sample with the target of ``loss.base_distillation``; held-out losses compare with the image's."""
        teacher = self.teacher[0]
        if teacher is None:
            return sample
        noisy = self.layout.split(sample.noisy)[0].contiguous()
        teacher.to(noisy.device)
        prediction = self.family.predict(teacher, noisy, sample.sigma_or_t, conditioning, guidance=self.guidance)
        return self.process.distilled(sample, prediction, self.settings.base_distillation)

    @torch.no_grad()
    def _parts(self, prediction: Tensor, sample: NoisySample) -> dict[str, Tensor]:
        """Mean squared errors of the kept base and detail channels (the two parts of Eq. 13), for the log."""
        errors = (prediction.float() - sample.target).square()
        kept = torch.ones_like(errors) if sample.kept is None else sample.kept.expand_as(errors)
        parts = zip(("base", "detail"), self.layout.split(errors), self.layout.split(kept), strict=True)
        return {name: part.sum() / count.sum().clamp(min=1) for name, part, count in parts}

    def _conditioning(self, batch: dict[str, Any]) -> Mapping[str, Tensor]:
        if isinstance(self.family, ClassFamily):
            labels = batch["label"]
            return {"class_labels": self.family.drop_labels(self.transformer, labels) if self.training else labels}
        conditioning: Mapping[str, Tensor] = batch["conditioning"]
        if not (self.training and self.dropout):
            return conditioning
        count = len(next(iter(conditioning.values())))
        dropped = torch.rand(count) < self.dropout  # drawn on the CPU: the same on every device
        mixed = {}
        for name, value in conditioning.items():
            where = dropped.to(value.device).view(-1, *[1] * (value.ndim - 1))
            empty = self.get_buffer(f"unconditional_{name}").to(value)
            mixed[name] = torch.where(where, empty, value)
        return mixed


def channel_prefixes(loss: FlowLossSettings, channels: int) -> ChannelPrefixes:
    """The prefixes that samples of a latent of ``channels`` channels are restricted to.

    Raises:
        DavaeError: one is not shorter than the latent.
    """
    return ChannelPrefixes(channels, loss.prefixes.channels, loss.prefixes.share)


def noise_process(
    family: PipelineFamily,
    pipe: DiffusionPipeline,
    layout: LatentLayout,
    loss: FlowLossSettings,
    timesteps: TimestepSettings,
) -> NoiseProcess:
    """The process that a pipeline's transformer was trained with: flow matching, or DDPM with its scheduler's betas.

    Raises:
        DavaeError: ``loss.form`` is one of flow matching, but the pipeline predicts noise.
    """
    weights: dict[str, Any] = {"min_snr_gamma": loss.min_snr_gamma, "cosine_weight": loss.cosine_weight}
    if family.kind == "ddpm":
        if loss.form != "velocity":
            raise DavaeError(f"loss.form={loss.form} is for flow matching; this pipeline predicts noise")
        return DdpmProcess(layout, pipe.scheduler.config, **weights)

    def shift(latent: Tensor) -> float:
        if timesteps.shift is not None:
            return timesteps.shift
        return family.timestep_shift(pipe, family.tokens(pipe.transformer, latent))

    table = None
    if timesteps.table is not None:
        shifts = timesteps.table
        table = sd3_sigma_table(shifts.config_shift, shifts.train_shift, shifts.steps)
    return FlowProcess(
        FlowLoss(layout, form=loss.form, **weights),
        scheme=timesteps.scheme,
        mean=timesteps.logit_mean,
        std=timesteps.logit_std,
        shift=shift,
        table=table,
    )
