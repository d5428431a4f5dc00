"""The autoencoder stages: the structured autoencoder of an upgrade, and the plain one of a new base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from davae.evaluation import psnr
from davae.latents import AlignmentLoss, ChannelStatistics, adaptive_weight, gaussian_kl, grouped_mean
from davae.models import AutoencoderDA, PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from davae.training.loop import Player, Stage
from davae.training.losses import ReconstructionLoss
from davae.training.pictures import save_rows
from davae.training.settings import (
    AlignmentSettings,
    AutoencoderSettings,
    BaseAutoencoderSettings,
    GanSettings,
    OptimizerSettings,
    ReconstructionSettings,
)

MAX_ADAPTIVE_ALIGNMENT = 1e8  # official code; its clamp for the GAN ratio is 1e4
MAX_ADAPTIVE_GAN = 1e4
_PICTURES = 8  # images in a validation picture


class Adversary(nn.Module):
    """The GAN's part in a generator's loss, and the discriminator's own loss on what the generator made last."""

    def __init__(self, settings: GanSettings) -> None:
        super().__init__()
        self.settings = settings
        self.discriminator = PatchDiscriminator(filters=settings.filters, layers=settings.layers)
        self._pair: tuple[Tensor, Tensor] | None = None

    def generator_term(
        self, images: Tensor, made: Tensor, reconstruction: Tensor, last: Tensor, step: int
    ) -> Tensor:
        """``weight * ratio * hinge`` for the generator; zero before ``start_step``.

        Args:
            images, made: ``[B, 3, H, W]``.
            reconstruction: scalar reconstruction loss, the reference of the adaptive ratio.
            last: weight of the decoder's last layer.
            step: the loop's step.
        """
        self._pair = (images.detach(), made.detach())
        if step < self.settings.start_step:
            return reconstruction.new_zeros(())
        self.discriminator.requires_grad_(False)
        loss = hinge_generator_loss(self.discriminator(made))
        self.discriminator.requires_grad_(True)
        weight: Tensor | float = self.settings.weight
        if self.settings.adaptive and torch.is_grad_enabled():
            weight = weight * adaptive_weight(reconstruction, loss, last, maximum=MAX_ADAPTIVE_GAN)
        return weight * loss

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """The discriminator's hinge loss; zero before ``start_step``."""
        if self._pair is None:
            raise RuntimeError("the generator has not run yet")
        images, made = self._pair
        loss = hinge_discriminator_loss(self.discriminator(images), self.discriminator(made))
        return {"total": loss * (step >= self.settings.start_step)}


class StructuredObjective(nn.Module):
    """The loss of one step of the autoencoder stage: reconstruction, KL, GAN and detail alignment."""

    def __init__(
        self,
        autoencoder: AutoencoderDA,
        alignment: AlignmentSettings,
        reconstruction: ReconstructionSettings,
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.alignment_settings, self.settings = alignment, reconstruction
        self.alignment = AlignmentLoss(autoencoder.layout, alignment.form)
        self.reconstruction = ReconstructionLoss(reconstruction)
        self._adversary = [adversary]  # in a list: its weights belong to the other player

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Named losses of a batch with ``image`` ``[B, 3, H, W]`` in [-1, 1]; ``total`` is what is minimised."""
        vae, images = self.autoencoder, batch["image"]
        z = vae.encode_base(images)  # [B, C, h, w]
        posterior = vae.encode_details(images)
        z_d = posterior.sample()  # [B, D, h, w]
        made = vae.decode_structured(z, z_d)  # [B, 3, H, W]

        losses = self.reconstruction(images, made)
        total = reference = losses["reconstruction"]
        losses["kl"] = gaussian_kl(posterior.mean, posterior.logvar, reduction=self.settings.kl_reduction)
        total = total + self.settings.kl_weight * losses["kl"]
        losses["alignment"] = self.alignment(z_d, vae.alignment_target(z))
        weight: Tensor | float = self.alignment_settings.weight
        if weight and self.alignment_settings.adaptive and torch.is_grad_enabled():
            ratio = adaptive_weight(
                reference, losses["alignment"], vae.alignment_weight, maximum=MAX_ADAPTIVE_ALIGNMENT
            )
            losses["alignment_weight"] = weight = weight * ratio
        total = total + weight * losses["alignment"]
        if self._adversary[0] is not None:
            losses["gan"] = self._adversary[0].generator_term(
                images, made, reference, vae.last_decoder_weight, step
            )
            total = total + losses["gan"]
        return {"total": total, **losses}


class AutoencoderStage(Stage):
    """Trains the detail encoder and joint decoder of an :class:`AutoencoderDA`; its base stays as it is."""

    name = "autoencoder"

    def __init__(
        self,
        autoencoder: AutoencoderDA,
        settings: AutoencoderSettings,
        dataset: Dataset[dict[str, Any]],
        held_out: Dataset[dict[str, Any]],
        *,
        workers: int = 0,
    ) -> None:
        self.autoencoder, self.settings, self.loop = autoencoder, settings, settings.loop
        self.dataset, self.held_out, self.workers = dataset, held_out, workers
        if settings.loop.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        adversary, players = _adversary(settings.reconstruction.gan)
        self.objective = StructuredObjective(
            autoencoder, settings.alignment, settings.reconstruction, adversary
        )
        self.players = [Player("model", self.objective, settings.optimizer), *players]

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """PSNR with and without details and of the base upscaled, and how well the details are aligned."""
        vae, images = self.autoencoder, _images(self.held_out, self.loop.validation_images)
        rows: dict[str, list[Tensor]] = {
            "input": [],
            "base, upscaled": [],
            "reconstruction": [],
            "no details": [],
        }
        aligned, energy, elements = 0.0, 0.0, 0
        for part in images.split(self.loop.batch_size):
            part = part.to(vae.device, vae.dtype)
            z, z_d = vae.encode_base(part), vae.encode_details(part).mean
            rows["input"].append(part.cpu())
            rows["base, upscaled"].append(upscaled_base(vae, part).cpu())
            rows["reconstruction"].append(vae.decode_structured(z, z_d).cpu())
            rows["no details"].append(vae.decode_structured(z, torch.zeros_like(z_d)).cpu())
            target = vae.alignment_target(z).float()
            projected = grouped_mean(z_d.float(), vae.layout.base_channels)
            aligned += float((projected - target).square().sum())
            energy += float(target.square().sum())
            elements += target.numel()
        whole = {name: torch.cat(parts) for name, parts in rows.items()}
        save_rows(samples / f"step-{step}.png", {k: v[:_PICTURES] for k, v in whole.items()})
        return {
            "psnr": _mean_psnr(images, whole["reconstruction"]),
            "psnr_base_upscaled": _mean_psnr(images, whole["base, upscaled"]),
            "psnr_no_details": _mean_psnr(images, whole["no details"]),
            "alignment": aligned / elements,
            "alignment_relative": aligned / energy,
        }

    def export(self, out: Path) -> Path:
        """Measure the detail channels, then write ``out/autoencoder``."""
        self.autoencoder.eval()
        set_detail_statistics(
            self.autoencoder, self.dataset, self.settings.statistics_images, self.loop.batch_size
        )
        self.autoencoder.to(memory_format=torch.contiguous_format)
        self.autoencoder.save_pretrained(out / "autoencoder")
        return out / "autoencoder"


@torch.no_grad()
def set_detail_statistics(
    vae: AutoencoderDA, dataset: Dataset[dict[str, Any]], most: int, batch_size: int
) -> None:
    """Measure mean and standard deviation of each detail channel and keep them in the autoencoder's config."""
    statistics = ChannelStatistics(vae.layout.detail_channels)
    count = min(most, len(dataset))  # type: ignore[arg-type]
    for batch in DataLoader(Subset(dataset, range(count)), batch_size, collate_fn=_stack_images):
        statistics.update(vae.encode_details(batch.to(vae.device, vae.dtype)).mean)
    vae.set_detail_statistics(statistics.mean, statistics.std)


@torch.no_grad()
def upscaled_base(vae: AutoencoderDA, images: Tensor) -> Tensor:
    """What the base alone gives at full resolution: its own reconstruction, enlarged bicubically."""
    z = vae.encode_base(images)
    small = vae.base.decode(z).sample  # [B, 3, H/s, W/s]
    return F.interpolate(small.float(), size=images.shape[-2:], mode="bicubic", align_corners=False).clamp(
        -1, 1
    )


class PlainObjective(nn.Module):
    """The loss of one step of a base autoencoder: reconstruction, KL and GAN."""

    def __init__(
        self, autoencoder: AutoencoderKL, settings: ReconstructionSettings, adversary: Adversary | None = None
    ) -> None:
        super().__init__()
        self.autoencoder, self.settings = autoencoder, settings
        self.reconstruction = ReconstructionLoss(settings)
        self._adversary = [adversary]

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Named losses of a batch with ``image`` ``[B, 3, H, W]`` in [-1, 1]; ``total`` is what is minimised."""
        images = batch["image"]
        posterior = self.autoencoder.encode(images).latent_dist
        made = self.autoencoder.decode(posterior.sample()).sample
        losses = self.reconstruction(images, made)
        total = reference = losses["reconstruction"]
        losses["kl"] = gaussian_kl(posterior.mean, posterior.logvar, reduction=self.settings.kl_reduction)
        total = total + self.settings.kl_weight * losses["kl"]
        if self._adversary[0] is not None:
            last = self.autoencoder.decoder.conv_out.weight
            losses["gan"] = self._adversary[0].generator_term(images, made, reference, last, step)
            total = total + losses["gan"]
        return {"total": total, **losses}


class BaseAutoencoderStage(Stage):
    """Trains a plain ``AutoencoderKL`` and measures its scaling and shift factors.

    Args:
        settings: the recipe's section.
        dataset: training images, at any scales.
        whole: the images as the transformer will see them; the factors are measured on these.
        held_out: validation images.
    """

    name = "base autoencoder"

    def __init__(
        self,
        settings: BaseAutoencoderSettings,
        dataset: Dataset[dict[str, Any]],
        whole: Dataset[dict[str, Any]],
        held_out: Dataset[dict[str, Any]],
    ) -> None:
        torch.manual_seed(settings.loop.seed)
        shape = settings.architecture
        levels = len(shape.block_out_channels)
        self.autoencoder = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(shape.block_out_channels),
            latent_channels=shape.latent_channels,
            layers_per_block=shape.layers_per_block,
            norm_num_groups=shape.norm_num_groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
            shift_factor=0.0,
        )
        self.settings, self.loop = settings, settings.loop
        self.dataset, self.whole, self.held_out = dataset, whole, held_out
        adversary, players = _adversary(settings.reconstruction.gan)
        self.objective = PlainObjective(self.autoencoder, settings.reconstruction, adversary)
        self.players = [Player("model", self.objective, settings.optimizer), *players]

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """PSNR of held-out images."""
        images = _images(self.held_out, self.loop.validation_images)
        device, made = self.autoencoder.device, []
        for part in images.split(self.loop.batch_size):
            made.append(self.autoencoder(part.to(device), sample_posterior=False).sample.cpu())
        reconstruction = torch.cat(made)
        rows = {"input": images[:_PICTURES], "reconstruction": reconstruction[:_PICTURES]}
        save_rows(samples / f"step-{step}.png", rows)
        return {"psnr": _mean_psnr(images, reconstruction)}

    @torch.no_grad()
    def export(self, out: Path) -> Path:
        """Set the scaling and shift factors so that latents have zero mean and unit variance; write ``out/vae``."""
        self.autoencoder.eval()
        channels = self.autoencoder.config.latent_channels
        statistics = ChannelStatistics(channels)
        for batch in DataLoader(self.whole, self.loop.batch_size, collate_fn=_stack_images):
            statistics.update(self.autoencoder.encode(batch.to(self.autoencoder.device)).latent_dist.mean)
        mean = statistics.mean.mean()
        variance = (statistics.std.square() + (statistics.mean - mean).square()).mean()
        self.autoencoder.register_to_config(scaling_factor=float(variance.rsqrt()), shift_factor=float(mean))
        self.autoencoder.to(memory_format=torch.contiguous_format)
        self.autoencoder.save_pretrained(out / "vae")
        return out / "vae"


def _adversary(settings: GanSettings) -> tuple[Adversary | None, list[Player]]:
    if not settings.weight:
        return None, []
    adversary = Adversary(settings)
    optimizer = OptimizerSettings(learning_rate=settings.learning_rate, betas=settings.betas)
    return adversary, [Player("discriminator", adversary, optimizer)]


def _images(dataset: Dataset[dict[str, Any]], count: int) -> Tensor:
    """The first ``count`` images of a data set, ``[N, 3, H, W]``."""
    return torch.stack([dataset[i]["image"] for i in range(min(count, len(dataset)))])  # type: ignore[arg-type]


def _mean_psnr(images: Tensor, made: Tensor) -> float:
    return float(psnr(images, made.float().clamp(-1, 1)).mean())


def _stack_images(items: list[dict[str, Any]]) -> Tensor:
    return torch.stack([item["image"] for item in items])
