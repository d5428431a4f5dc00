"""The loss of one step of the diffusion stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from davae.latents import LatentLayout
from davae.pipelines.families import PipelineFamily
from davae.recipes.settings import FlowLossSettings
from davae.training.diffusion.noise import NoiseProcess
from davae.warm_start import detail_weight


class DiffusionObjective(nn.Module):
    """Noise in, the family's prediction out, Eq. 12 and 13 between.

    The draws of a step are, in this order: levels of noise, noise, and which prompts are dropped. They do not
    depend on whether latents and embeddings come from a cache.

    Args:
        family: how the transformer is called.
        transformer: the (widened) transformer.
        layout: which channels are base and which are detail; no detail channels for a base model.
        process: how noise is added and the prediction measured.
        loss: the schedule of the detail channels.
        encode: images to latents, where a batch holds no ``latent``.
        unconditional: the empty prompt's conditioning, first axis 1; needed for prompt dropout.
        dropout: share of samples trained with the empty prompt.
        guidance: what a guidance-distilled transformer is told.
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
    ) -> None:
        super().__init__()
        self.family, self.process, self.encode = family, process, encode
        self.transformer = transformer
        self.layout, self.settings = layout, loss
        self.dropout, self.guidance = dropout, guidance
        for name, value in (
            unconditional or {}
        ).items():  # moves with the module and stays out of checkpoints
            self.register_buffer(f"unconditional_{name}", value, persistent=False)

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Named losses of a batch.

        Args:
            batch: ``latent`` ``[B, C + D, h, w]`` as the transformer sees it or ``image``; and ``label`` ``[B]``
                or ``conditioning``, as the family is conditioned on classes or text.
            step: optimizer step, for the schedule of the detail channels.
        """
        data = (
            self.encode(batch["image"]) if self.encode is not None and "image" in batch else batch["latent"]
        )
        # Draws fill memory in its order: channels-last latents of an encoder would meet other noise than cached.
        sample = self.process.draw(data.contiguous())
        conditioning = self._conditioning(batch)
        prediction, variance = self.family.predict_with_variance(
            self.transformer,
            sample.noisy,
            sample.level,
            conditioning,
            guidance=self.guidance,
        )
        weight = detail_weight(
            step, self.settings.detail_warmup_steps, shape=self.settings.detail_schedule
        )  # w(n), Eq. 12
        loss = self.process.loss(prediction, sample, weight)
        bound = None
        if variance is not None and self.settings.variance_weight:
            bound = self.process.variance_loss(prediction, variance, sample, weight)
            loss = loss + self.settings.variance_weight * bound
        with torch.no_grad():  # the two parts of Eq. 13 apart, for the log
            base, detail = self.layout.split((prediction.float() - sample.target).square())
        parts = {"base": base.mean(), "detail": detail.mean()} if self.layout.detail_channels else {}
        if bound is not None:
            parts["variance"] = bound.detach()
        return {"total": loss, **parts, "detail_weight": loss.new_tensor(weight)}

    def _conditioning(self, batch: dict[str, Any]) -> Mapping[str, Tensor]:
        if self.family.conditioned_on == "class":  # these transformers drop labels themselves
            return {"class_labels": batch["label"]}
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
