"""The loss of a plain autoencoder: of a new base, and of every DC-AE phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from davae.latents import ChannelPrefixes, gaussian_kl
from davae.models.dc_ae import DeepAutoencoder, last_decoder_weight
from davae.recipes.loop import OptimizerSettings
from davae.recipes.settings import ReconstructionSettings
from davae.training.autoencoder.losses import GanLoss, ReconstructionLoss, make_gan_loss
from davae.training.loop.rng import drawing
from davae.training.stage import TrainedModule


def plain_modules(
    autoencoder: DeepAutoencoder,
    layers: Sequence[nn.Module],
    settings: ReconstructionSettings,
    optimizer: OptimizerSettings,
    prefixes: ChannelPrefixes | None = None,
) -> tuple[PlainObjective, list[TrainedModule]]:
    """The objective, and the modules to train: the autoencoder's ``layers``, and the discriminator if there is one."""
    gan_loss, modules = make_gan_loss(settings.gan)
    objective = PlainObjective(autoencoder, layers, settings, gan_loss, prefixes)
    adaptive = settings.gan.weight > 0 and settings.gan.adaptive
    return objective, [TrainedModule("model", objective, optimizer, can_be_sharded=not adaptive), *modules]


class PlainObjective(nn.Module):
    """Reconstruction, KL and GAN losses; the module holds the whole autoencoder, of which ``layers`` are trained.

    Args:
        autoencoder: an ``AutoencoderDC``, or an ``AutoencoderKL`` (sampled, with the KL term).
        layers: the parts to train. The rest takes no gradient and stays in eval mode even after ``train()``.
        settings: weights of the terms.
        gan_loss: the adversarial term, or ``None``.
        prefixes: in training, the latents that are decoded from their first channels, the others zero.
    """

    def __init__(
        self,
        autoencoder: DeepAutoencoder,
        layers: Sequence[nn.Module],
        settings: ReconstructionSettings,
        gan_loss: GanLoss | None = None,
        prefixes: ChannelPrefixes | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder, self.settings, self.prefixes = autoencoder, settings, prefixes
        self._layers = list(layers)  # in a list, unregistered: the autoencoder holds them already
        self._gan_loss = [gan_loss]  # in a list: its weights belong to another module
        self.reconstruction = ReconstructionLoss(settings)
        autoencoder.requires_grad_(False)
        for layer in self._layers:
            layer.requires_grad_(True)
            for norm in layer.modules():
                if isinstance(norm, nn.GroupNorm):
                    norm.register_forward_pre_hook(_with_gradient)
        self.train()

    def train(self, mode: bool = True) -> PlainObjective:
        """As in torch, but frozen layers stay in eval mode, so that their running averages do not change."""
        super().train(mode)
        self.autoencoder.eval()
        for layer in self._layers:
            layer.train(mode)
        return self

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Named scalar losses of a batch with ``image`` ``[B, 3, H, W]`` in [-1, 1]; ``total`` is minimised."""
        model, images = self.autoencoder, batch["image"]
        kl = None
        if isinstance(model, AutoencoderKL):
            posterior = model.encode(images).latent_dist
            with drawing():
                z = posterior.sample()  # [B, C, H / f, W / f]
            kl = gaussian_kl(posterior.mean, posterior.logvar, reduction=self.settings.kl_reduction)
        else:
            z = model.encode(images).latent
        if self.training and self.prefixes:
            with drawing():
                z = z * self.prefixes.draw(z)
        made = model.decode(z).sample  # [B, 3, H, W]

        losses = self.reconstruction(images, made)
        total = losses["reconstruction"]
        if kl is not None:
            losses["kl"] = kl
            total = total + self.settings.kl_weight * kl
        if self._gan_loss[0] is not None:
            last = last_decoder_weight(model)
            losses["gan"] = self._gan_loss[0].generator_term(images, made, losses["reconstruction"], last, step)
            total = total + losses["gan"]
        return {"total": total, **losses}


def _with_gradient(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
    """Let a group norm after frozen layers compute the gradient of its input, though nothing uses it.

    torch (2.13, CPU, channels-last) crashes in a group norm's backward pass if only its weights require gradients.
    """
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return None
    return (inputs[0].detach().requires_grad_(), *inputs[1:])
