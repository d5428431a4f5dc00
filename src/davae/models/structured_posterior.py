"""The posterior of a structured latent: a fixed base part, a Gaussian detail part."""

from __future__ import annotations

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from davae.latents import LatentLayout


class StructuredPosterior:
    """``latent_dist`` of ``AutoencoderDA.encode``: latents ``[z, x_d]`` as pipelines have them.

    The base part is the base VAE's posterior mean in every sample; only the details vary.

    Args:
        layout: channel counts.
        z: base latent ``[B, C, h, w]``.
        detail_mean, detail_std: of the details in the pipeline's convention, ``[B, D, h, w]``.
    """

    def __init__(self, layout: LatentLayout, z: Tensor, detail_mean: Tensor, detail_std: Tensor) -> None:
        self.layout = layout
        self.mean = layout.join(z, detail_mean)  # [B, C + D, h, w]
        self.std = layout.join(torch.zeros_like(z), detail_std)

    @property
    def var(self) -> Tensor:
        """Variance ``[B, C + D, h, w]``; zero on the base channels."""
        return self.std.square()

    def mode(self) -> Tensor:
        """The mean, ``[B, C + D, h, w]``."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """A sample ``[B, C + D, h, w]``; its base part is the mean, bit for bit."""
        z, mean = self.layout.split(self.mean)
        _, std = self.layout.split(self.std)
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.layout.join(z, mean + std * noise)
