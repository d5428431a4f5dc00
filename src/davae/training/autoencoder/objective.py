"""The loss of the autoencoder stage."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from davae.choices import ReconstructionTarget
from davae.errors import DavaeError
from davae.latents import AlignmentLoss, LatentLayout, gaussian_kl
from davae.models import AutoencoderDA
from davae.models.latent_space import native_reconstruction
from davae.recipes.settings import AlignmentSettings, ImageTerms, ReconstructionSettings
from davae.runtime.pixel_budget import in_parts
from davae.training.autoencoder.adaptive_weights import Decoded, Measure, single_pass
from davae.training.autoencoder.losses import GanLoss, ReconstructionLoss
from davae.training.loop.rng import drawing

MAX_ADAPTIVE_ALIGNMENT = 1e8  # official code


class StructuredObjective(nn.Module):
    """The loss of one step: reconstruction, KL, GAN and detail alignment, summed over the levels that are trained.

    Args:
        autoencoder: what is trained: all levels after ``train_levels(together=True)``, otherwise the last one.
        alignment, reconstruction: the recipe's sections, the same for every level.
        gan_losses: one per trained level, lowest first; ``None`` without a GAN.
        target: what reconstructions are compared with: the images, or the base VAE's reconstructions of them.
        detail_noise: largest strength of :func:`noised`, drawn evenly between 0 and it for each sample.
        alone: terms for the samples whose details are taken away; None takes those of ``reconstruction``.
        rescale_details: see :meth:`AutoencoderDA.drop_details`.

    Raises:
        DavaeError: the target is the base's, whose decoder was dropped.
    """

    def __init__(
        self,
        autoencoder: AutoencoderDA,
        alignment: AlignmentSettings,
        reconstruction: ReconstructionSettings,
        gan_losses: list[GanLoss | None] | None = None,
        *,
        target: ReconstructionTarget = "image",
        detail_noise: float = 0.0,
        alone: ImageTerms | None = None,
        rescale_details: bool = True,
    ) -> None:
        super().__init__()
        if target == "base" and not autoencoder.config.has_base_decoder:
            raise DavaeError(
                "autoencoder.target=base needs the base VAE's decoder, which this autoencoder has dropped: start from "
                "one that has it, or set autoencoder.target=image"
            )
        self.autoencoder, self.target, self.detail_noise = autoencoder, target, detail_noise
        self.rescale_details = rescale_details
        self.alignment_settings, self.settings = alignment, reconstruction
        self.learning = levels_that_learn(autoencoder)
        self.alignments = nn.ModuleList(
            AlignmentLoss(alignment_layout(level, alignment), alignment.form) for level in self._levels()
        )
        self.reconstruction = ReconstructionLoss(reconstruction, alone)
        self._gan_losses = gan_losses or [None] * len(self.learning)  # in a list: their weights belong to other modules

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Named scalar losses of a batch with ``image`` ``[B, 3, H, W]`` in [-1, 1]; ``total`` is minimised.

        With several levels the names begin with the level, as in ``level2_l1``. A batch may contain what
        :meth:`keepable` makes of its images.
        """
        levels = self._levels()
        images = self._images(batch["image"])
        if self.target == "image":
            targets = images
        elif (target := batch.get("target")) is not None:
            targets = [target.to(images[0].dtype)]
        else:
            targets = [self._base_reconstruction(image) for image in images]
        cached = batch.get("base_latent")
        latent = self._encode(images[0]) if cached is None else cached
        # [B, C, h, w]; every level appends its details
        total = images[0].new_zeros(())
        named: dict[str, Tensor] = {}
        for i, (number, level) in enumerate(zip(self.learning, levels)):
            losses, z_d = self._level(i, level, images[i], targets[i], latent, step)
            latent = torch.cat([latent, z_d], dim=1) if i + 1 < len(levels) else latent
            total = total + losses.pop("total")
            prefix = f"level{number}_" if len(self.autoencoder.levels) > 2 else ""
            named |= {prefix + name: value for name, value in losses.items()}
        return {"total": total, **named}

    def keepable(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """What stays the same in every step, by name in a batch, as functions of full-resolution images.

        ``base_latent`` is the latent ``[B, C, h, w]`` below the trained levels. ``target``, where the base's
        reconstruction is one, is that as float16 (6 bytes a pixel; rounding is below 2.5e-4); with several levels in
        training it is made in every step, since each has its own.
        """
        made: dict[str, Callable[[Tensor], Tensor]] = {"base_latent": self._frozen_latent}
        if self.target == "base" and len(self.learning) == 1:
            made["target"] = lambda images: self._base_reconstruction(self._here(images)).half()
        return made

    @torch.no_grad()
    def _frozen_latent(self, images: Tensor) -> Tensor:
        return self._encode(self._images(self._here(images))[0])

    def _here(self, images: Tensor) -> Tensor:
        return images.to(self.autoencoder.device, self.autoencoder.dtype)

    def _images(self, images: Tensor) -> list[Tensor]:
        """The images at the resolution of each trained level, lowest first."""
        found = [images]
        for level in reversed(self._levels()[1:]):
            found.insert(0, level.reduce(found[0]))
        return found

    def _encode(self, images: Tensor) -> Tensor:
        # Targets are exact, as in stage 2; some bases (SDXL's) overflow in float16.
        with torch.autocast(images.device.type, enabled=False):
            return self._levels()[0].encode_prefix(images)

    @torch.no_grad()
    def _base_reconstruction(self, images: Tensor) -> Tensor:
        """The base VAE's reconstruction of ``[B, 3, H, W]`` images at full size, clamped to [-1, 1]."""
        with torch.autocast(images.device.type, enabled=False):
            made = [native_reconstruction(self.autoencoder, part).clamp(-1.0, 1.0) for part in in_parts(images)]
        return torch.cat(made).to(images.dtype)

    def _level(
        self, i: int, vae: AutoencoderDA, images: Tensor, targets: Tensor, latent: Tensor, step: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of one level, and the details ``[B, D, h, w]`` that it appends to the ``latent`` below it."""
        if not vae.uses_details:
            z_d = latent.new_zeros(len(latent), vae.own_layout.detail_channels, *latent.shape[-2:])
            absent = torch.ones(len(latent), dtype=torch.bool, device=latent.device)
            decoded = self._reconstruct(i, vae, latent, z_d, absent, targets, step, aligns=False)
            return {"total": decoded.total, **decoded.losses}, z_d
        posterior = vae.encode_own_details(images)
        with drawing():
            z_d = posterior.sample()  # [B, D, h, w]
            kept = noised(z_d, self.detail_noise) if self.detail_noise and vae.training else z_d
            kept, absent = vae.drop_details(latent, kept, rescale=self.rescale_details)
        aligned = latent[:, : alignment_layout(vae, self.alignment_settings).base_channels].detach()
        kl = gaussian_kl(posterior.mean, posterior.logvar, reduction=self.settings.kl_reduction)
        alignment = self.alignments[i](z_d, vae.alignment_target(aligned))

        weight: Tensor | float = self.alignment_settings.weight
        aligns = bool(weight) and self.alignment_settings.adaptive and torch.is_grad_enabled()
        decoded = self._reconstruct(i, vae, latent, kept, absent, targets, step, aligns=aligns)
        losses = {**decoded.losses, "kl": kl, "alignment": alignment}
        if aligns:
            ratio = decoded.alignment_ratio(kept, alignment, vae.alignment_weight, maximum=MAX_ADAPTIVE_ALIGNMENT)
            losses["alignment_weight"] = weight = weight * ratio
        total = decoded.total + self.settings.kl_weight * kl + weight * alignment
        return {"total": total, **losses}, z_d

    def _reconstruct(
        self,
        i: int,
        vae: AutoencoderDA,
        latent: Tensor,
        z_d: Tensor,
        absent: Tensor,
        targets: Tensor,
        step: int,
        *,
        aligns: bool,
    ) -> Decoded:
        """Decode one level and compute its reconstruction and adversarial losses.

        Args:
            i: the level's place among those that are trained.
            vae, latent, z_d, targets: as in :meth:`_level`.
            absent: which samples have no details of their own, ``[B]``.
            step: the loop's step.
            aligns: keep the gradient that an adaptive alignment weight needs.
        """
        gan_loss = self._gan_losses[i]
        measure = self._measure(absent)
        adapts = gan_loss is not None and gan_loss.settings.adaptive and torch.is_grad_enabled()
        if aligns or adapts:
            return self._decode(vae, latent, z_d, targets, measure, gan_loss, step, at_details=aligns)
        made = vae.decode_structured(latent, z_d)  # [B, 3, H, W]
        losses = measure(targets, made)
        total = losses["reconstruction"]
        if gan_loss is not None:
            losses["gan"] = gan_loss.generator_term(targets, made, total, vae.last_decoder_weight, step)
            total = total + losses["gan"]
        return Decoded(losses, total, at_details=None, scale=1.0)

    def _decode(
        self,
        vae: AutoencoderDA,
        latent: Tensor,
        z_d: Tensor,
        images: Tensor,
        measure: Measure,
        gan_loss: GanLoss | None,
        step: int,
        *,
        at_details: bool,
    ) -> Decoded:
        """Decode and compute the losses where a weight is adaptive."""
        return single_pass(vae, latent, z_d, images, measure, gan_loss, step, at_details=at_details)

    def _measure(self, absent: Tensor) -> Measure:
        """The reconstruction loss of a batch, of which some samples ``[B]`` have no details."""
        loss = self.reconstruction
        return loss if loss.alone is None else partial(loss, without=absent)

    def _levels(self) -> list[AutoencoderDA]:
        return [self.autoencoder.at_level(number) for number in self.learning]


def noised(z_d: Tensor, largest: float) -> Tensor:
    """Details ``[B, D, h, w]`` with normal noise of ``strength`` times each channel's standard deviation in the batch.

    ``strength`` is drawn evenly from [0, ``largest``] for each sample, so that a decoder trained on them knows exact
    details and those that a diffusion model gets wrong.
    """
    strength = largest * torch.rand(len(z_d), 1, 1, 1, device=z_d.device)
    deviation = z_d.detach().float().std(dim=(0, 2, 3), keepdim=True)
    return z_d + (strength * deviation * torch.randn(z_d.shape, device=z_d.device)).to(z_d.dtype)


def levels_that_learn(vae: AutoencoderDA) -> list[int]:
    """Numbers of the levels that are trained, lowest first."""
    last = vae.levels[-1].number
    return list(range(1, last + 1)) if vae.trains_below else [last]


def alignment_layout(vae: AutoencoderDA, settings: AlignmentSettings) -> LatentLayout:
    """The channels that a level's details are aligned with (the base latent, or all channels below), and its own."""
    if settings.target == "prefix":
        return vae.own_layout
    return LatentLayout(vae.layout.base_channels, vae.own_layout.detail_channels)
