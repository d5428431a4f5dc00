"""From a pipeline and a structured autoencoder to a pipeline of the same class that makes larger images."""

from __future__ import annotations

import inspect
import logging
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.warm_start import widen_channels

logger = logging.getLogger(__name__)
P = TypeVar("P", bound=DiffusionPipeline)


def upgrade_pipeline(pipe: P, vae: AutoencoderDA) -> P:
    """Swap the autoencoder and widen the transformer; everything else is kept and shared with ``pipe``.

    The result starts as the pretrained model: its base channels follow the base pipeline exactly and its detail
    channels are silent until they are tuned. ``height`` and ``width`` then mean the full resolution.

    Args:
        pipe: a pipeline with a ``vae`` and a ``transformer``; it is not changed.
        vae: made from ``pipe.vae`` by :meth:`AutoencoderDA.from_base`.

    Returns:
        A new pipeline of the same class.

    Raises:
        DavaeError: the pipeline has no transformer or VAE, or ``vae`` was made from another base.
        WarmStartError: the widened transformer does not start as the original (the layer is named).
    """
    for part in ("vae", "transformer"):
        if not isinstance(getattr(pipe, part, None), nn.Module):
            raise DavaeError(f"{type(pipe).__name__} has no {part}: davae upgrades pipelines that have both")
    if not isinstance(vae, AutoencoderDA):
        raise DavaeError(f"upgrade_pipeline takes an AutoencoderDA, not {type(vae).__name__}")
    _check_same_base(pipe.vae, vae)
    transformer = widen_channels(
        pipe.transformer,
        base_channels=vae.layout.base_channels,
        detail_channels=vae.layout.detail_channels,
    )
    replaced = {"vae": vae, "transformer": transformer}
    return type(pipe)(**{**_constructor_arguments(pipe), **replaced})


def _constructor_arguments(pipe: DiffusionPipeline) -> dict[str, object]:
    """What the pipeline was made of: its components, and the settings in its configuration."""
    arguments = {}
    for name in inspect.signature(type(pipe).__init__).parameters:
        if name in pipe.components:
            arguments[name] = pipe.components[name]
        elif name in pipe.config:
            arguments[name] = pipe.config[name]
    return arguments


@torch.no_grad()
def _check_same_base(base: nn.Module, vae: AutoencoderDA) -> None:
    """The frozen part of ``vae`` must be the pipeline's own VAE, or the latents would mean something else."""
    if isinstance(base, AutoencoderDA):
        raise DavaeError("this pipeline has been upgraded before: upgrade the base pipeline instead")
    if type(vae.base) is not type(base):
        raise DavaeError(
            f"the autoencoder was made from a {type(vae.base).__name__}, the pipeline has a {type(base).__name__}"
        )
    ours, theirs = vae.base.state_dict(), base.state_dict()
    if ours.keys() != theirs.keys():
        raise DavaeError(
            f"the autoencoder's base has other layers than the pipeline's VAE: {min(ours.keys() ^ theirs.keys())}"
        )
    for name, theirs_value in theirs.items():
        ours_value = ours[name]
        if ours_value.shape != theirs_value.shape:
            raise DavaeError(
                f"the autoencoder was made from another base VAE: '{name}' has shape {tuple(ours_value.shape)}, "
                f"the pipeline's {tuple(theirs_value.shape)}"
            )
        narrow = min(ours_value.dtype, theirs_value.dtype, key=lambda dtype: dtype.itemsize)
        same = torch.equal(ours_value.to(narrow), theirs_value.to(device=ours_value.device, dtype=narrow))
        if not same:
            raise DavaeError(
                f"the autoencoder was made from another base VAE: '{name}' differs from the pipeline's. "
                "Train the autoencoder with AutoencoderDA.from_base(pipe.vae, ...)"
            )
