"""Adaptive loss weights without further backward passes through the decoder.

An adaptive weight is the ratio of two losses' gradient norms at one layer, so it must be known before the weighted sum
is back-propagated. Done plainly, each gradient takes a backward pass of its own and the sum one more. Here the graph is
cut at the decoded image and at the latent: the losses are differentiated to the image, their weighted sum is
back-propagated through the decoder once, and the gradients at the latent and at the decoder's weights are stored and
passed on when ``backward`` is called on the total.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from davae.latents import gradient_ratio, gradient_scale
from davae.models import AutoencoderDA
from davae.training.autoencoder.losses import MAX_ADAPTIVE_GAN, GanLoss

Measure = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Decoded:
    """A decoded and measured latent.

    Attributes:
        losses: the scalar terms; the weighted adversarial one is ``gan``.
        total: scalar, reconstruction plus adversarial term; its backward passes on the stored gradients.
        at_details: gradient of the reconstruction loss at ``z_d``, ``[B, D, h, w]``; ``None`` if not requested.
        scale: factor that ``at_details`` contains.
    """

    losses: dict[str, Tensor]
    total: Tensor
    at_details: Tensor | None
    scale: float

    def alignment_ratio(self, z_d: Tensor, alignment: Tensor, weight: Tensor, *, maximum: float) -> Tensor:
        """The adaptive weight of the alignment loss, from gradients at ``weight`` of the layer that outputs ``z_d``."""
        (reference,) = grad(z_d, weight, self.at_details, retain_graph=True)
        (gradient,) = grad(self.scale * alignment, weight, retain_graph=True)
        return gradient_ratio(reference, gradient, maximum=maximum, scale=self.scale)


def single_pass(
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
    """Decode, compute the losses, and back-propagate them through the decoder.

    Args:
        vae: the autoencoder whose ``decode_structured`` is called.
        latent, z_d: ``[B, C, h, w]`` and ``[B, D, h, w]``, attached to their graphs.
        images: targets, ``[B, 3, H, W]`` in [-1, 1].
        measure: maps images and reconstruction to losses, among them ``reconstruction``.
        gan_loss: of this level, or ``None``.
        step: the loop's step.
        at_details: keep the gradient of the reconstruction loss at ``z_d``. With an active GAN this takes one more
            backward pass through the decoder, to its inputs only.
    """
    below, details = _leaf(latent), _leaf(z_d)
    made = vae.decode_structured(below, details)
    image = _leaf(made)
    losses = measure(images, image)
    scale = gradient_scale(image.device)
    value = losses["reconstruction"].detach()
    (at_image,) = grad(scale * losses["reconstruction"], image)
    at_z_d = None
    if gan_loss is not None:
        hinge = gan_loss.hinge(images, image, step)
        losses["gan"] = value.new_zeros(())
        if hinge is not None:
            if at_details:
                (at_z_d,) = grad(made, details, at_image, retain_graph=True)
            (adverse,) = grad(scale * hinge, image)
            weight: Tensor | float = gan_loss.settings.weight
            if gan_loss.settings.adaptive:
                last = vae.last_decoder_weight
                norms = [grad(made, last, g, retain_graph=True)[0] for g in (at_image, adverse)]
                weight = weight * gradient_ratio(*norms, maximum=MAX_ADAPTIVE_GAN, scale=scale)
            losses["gan"] = (weight * hinge).detach()
            at_image = at_image + weight * adverse
        value = value + losses["gan"]
    leaves = [(leaf, tensor) for leaf, tensor in ((details, z_d), (below, latent)) if leaf.requires_grad]
    learning = [p for part in (vae.up, vae.joint_decoder) for p in part.parameters() if p.requires_grad]
    gradients = grad(made, [*(leaf for leaf, _ in leaves), *learning], at_image)
    total = with_gradients(value, [*(tensor for _, tensor in leaves), *learning], gradients, scale=scale)
    if at_details and at_z_d is None:
        at_z_d = gradients[0]
    return Decoded({k: v.detach() for k, v in losses.items()}, total, at_z_d, scale)


def with_gradients(
    value: Tensor, tensors: Sequence[Tensor], gradients: Sequence[Tensor], *, scale: float = 1.0
) -> Tensor:
    """A scalar ``value`` whose backward passes the precomputed ``gradients / scale`` on to ``tensors``."""
    total: Tensor = _WithGradients.apply(value, scale, list(gradients), *tensors)
    return total


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: float, gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.scale, ctx.gradients = scale, gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, None, *torch._foreach_mul(ctx.gradients, outer[0] / ctx.scale)


def _leaf(tensor: Tensor) -> Tensor:
    """The same values as a leaf of a new graph."""
    return tensor.detach().requires_grad_(tensor.requires_grad)
