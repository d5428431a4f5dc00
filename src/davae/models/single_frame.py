"""Images as videos of one frame, as autoencoders that come from video models and their pipelines hold them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor

from davae.errors import DavaeError
from davae.models.structured_posterior import StructuredPosterior


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
    """A method of images ``[B, C, H, W]`` also takes ``[B, C, 1, H, W]``, and then gives everything with that axis.

    A call with images passes through untouched.

    Raises:
        DavaeError: more than one frame.
    """

    @functools.wraps(method)
    def with_frames(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 5:
            return method(self, x, *args, **kwargs)
        if x.shape[2] != 1:
            raise DavaeError(f"{x.shape[2]} frames were given: this autoencoder makes single images")
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
    if isinstance(result, AutoencoderKLOutput):
        return AutoencoderKLOutput(latent_dist=SingleFramePosterior(result.latent_dist))
    raise TypeError(f"nothing is known about frames of a {type(result).__name__}")


def without_alpha(images: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` of such with three channels, or with four, of which the last is opacity."""
    return images[:, :3] if images.shape[1] == 4 else images
