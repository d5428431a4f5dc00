"""The stage 1 loss with every adaptive weight by backward passes of its own, to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.autograd import grad

from davae.latents import gradient_ratio, gradient_scale
from davae.models import AutoencoderDA
from davae.training.adaptive_weights import Decoded
from davae.training.adversary import MAX_ADAPTIVE_GAN, Adversary
from davae.training.autoencoder import AutoencoderStage
from davae.training.structured_objective import StructuredObjective


@dataclass(frozen=True)
class _Decoded(Decoded):
    among: Sequence[Tensor] = ()
    """Gradients are taken at all of these, as a whole backward pass does."""

    def alignment_ratio(self, z_d: Tensor, alignment: Tensor, weight: Tensor, *, maximum: float) -> Tensor:
        return _ratio(self.losses["reconstruction"], alignment, weight, self.among, maximum)


class SeparatePassesObjective(StructuredObjective):
    """Equal losses and gradients, one whole backward pass more for each adaptive weight's two gradients."""

    def _decode(
        self,
        vae: AutoencoderDA,
        latent: Tensor,
        z_d: Tensor,
        images: Tensor,
        adversary: Adversary | None,
        step: int,
        *,
        at_details: bool,
    ) -> _Decoded:
        made = vae.decode_structured(latent, z_d)
        losses = self.reconstruction(images, made)
        total, among = losses["reconstruction"], list(vae.trained_parameters())
        if adversary is not None:
            hinge = adversary.hinge(images, made, step)
            losses["gan"] = total.new_zeros(())
            if hinge is not None:
                weight: Tensor | float = adversary.settings.weight
                if adversary.settings.adaptive:
                    last = vae.last_decoder_weight
                    weight = weight * _ratio(total, hinge, last, among, MAX_ADAPTIVE_GAN)
                losses["gan"] = weight * hinge
            total = total + losses["gan"]
        return _Decoded(losses, total, None, 1.0, among)


class SeparatePassesStage(AutoencoderStage):
    """The autoencoder stage with :class:`SeparatePassesObjective`."""

    objective_class = SeparatePassesObjective


def _ratio(
    reference: Tensor, loss: Tensor, weight: Tensor, among: Sequence[Tensor], maximum: float
) -> Tensor:
    scale = gradient_scale(weight.device)
    place = next(i for i, tensor in enumerate(among) if tensor is weight)
    first, second = (
        grad(scale * term, among, retain_graph=True, allow_unused=True)[place] for term in (reference, loss)
    )
    return gradient_ratio(first, second, maximum=maximum, scale=scale)
