"""The posterior of a structured latent: a fixed base part, a Gaussian detail part; also as a single frame."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import LatentLayout


class StructuredPosterior:
    """``latent_dist`` of ``AutoencoderDA.encode``: latents ``[z, x_d]`` in the pipelines' convention.

    The base part is the base VAE's posterior mean in every sample; only the details vary.

    Args:
        layout: channel counts.
        z: base latent ``[B, C, h, w]``.
        detail_mean, detail_std: of the details, ``[B, D, h, w]``.
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


class EncodedLatents(AutoencoderKLOutput):
    """What ``AutoencoderDA.encode`` returns, under every name by which diffusers' pipelines read latents.

    ``latent_dist`` is the posterior; ``latent`` (as in ``AutoencoderDC``) and ``latents`` (as in ``AutoencoderTiny``)
    are its mode.
    """

    @property
    def latent(self) -> Tensor:
        """``[B, C + D, h, w]``."""
        return self.latent_dist.mode()

    @property
    def latents(self) -> Tensor:
        """``[B, C + D, h, w]``."""
        return self.latent_dist.mode()


class SingleFramePosterior:
    """A posterior over ``[B, C, h, w]`` seen as one over ``[B, C, 1, h, w]``."""

    def __init__(self, images: StructuredPosterior) -> None:
        self.images = images

    @property
    def mean(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.mean.unsqueeze(2)

    @property
    def std(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.std.unsqueeze(2)

    @property
    def var(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.var.unsqueeze(2)

    def mode(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.mode().unsqueeze(2)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.sample(generator).unsqueeze(2)


def takes_single_frame(method: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method of ``[B, C, H, W]`` also take a frame ``[B, C, 1, H, W]``; its results then have that axis too.

    Calls with four-dimensional input pass through unchanged.

    Raises:
        DavaeError: more than one frame.
    """

    @functools.wraps(method)
    def with_frames(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 5:
            return method(self, x, *args, **kwargs)
        if x.shape[2] != 1:
            raise DavaeError(f"{x.shape[2]} frames were given: this autoencoder takes single images")
        return _with_frame(method(self, x.squeeze(2), *args, **kwargs))

    return with_frames


def _with_frame(result: Any) -> Any:
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return tuple(_with_frame(part) for part in result)
    if isinstance(result, Tensor):
        return result.unsqueeze(2)
    if isinstance(result, StructuredPosterior):
        return SingleFramePosterior(result)
    if isinstance(result, DecoderOutput):
        return DecoderOutput(sample=result.sample.unsqueeze(2))
    if isinstance(result, EncodedLatents):
        return EncodedLatents(latent_dist=SingleFramePosterior(result.latent_dist))
    raise TypeError(f"nothing is known about frames of a {type(result).__name__}")


def without_alpha(images: Tensor) -> Tensor:
    """Images without the alpha channel, if they have one: ``[B, 3 or 4, ...]`` to ``[B, 3, ...]``."""
    return images[:, :3] if images.shape[1] == 4 else images
