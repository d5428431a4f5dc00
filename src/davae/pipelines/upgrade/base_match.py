"""Whether an autoencoder was made from a pipeline's own VAE, and which of its channels the pipeline has already."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import AutoencoderDA


@torch.no_grad()
def layout_over(base: nn.Module, vae: AutoencoderDA) -> LatentLayout:
    """The channels that a pipeline with the VAE ``base`` knows (base channels), and those that ``vae`` adds.

    ``base`` is the pretrained VAE, or a level of ``vae`` where the pipeline has been upgraded and tuned before:
    the latent ``[z, z_d1]`` that it knows is then what counts as base.

    Raises:
        DavaeError: ``vae`` was made from another base, or adds nothing to it. The first difference is named.
    """
    if isinstance(base, AutoencoderDA):
        number, levels = base.levels[-1].number, vae.levels
        if number >= levels[-1].number:
            raise DavaeError(
                f"this pipeline has been upgraded before, to scale {base.scale} with {base.layout.channels} "
                "channels: upgrade its base pipeline instead, or add a level to its autoencoder with "
                "AutoencoderDA.from_base(pipe.vae, ...)"
            )
        ours: Any = vae.at_level(number)
        known = ours.layout.channels
    else:
        ours, known = vae.base_vae, vae.layout.base_channels
    if type(ours) is not type(base):
        raise DavaeError(
            f"the autoencoder was made from a {type(ours).__name__}, the pipeline has a {type(base).__name__}"
        )
    _check_same_weights(ours, base, whole=vae.config.has_base_decoder)
    if isinstance(base, AutoencoderDA):
        _check_same_statistics(ours, base)
    return LatentLayout(known, vae.layout.channels - known)


def _check_same_statistics(ours: Any, theirs: Any) -> None:
    for name, mine, other in zip(("mean", "std"), ours.detail_statistics(), theirs.detail_statistics()):
        if not torch.allclose(mine, other.to(mine.device)):
            raise DavaeError(
                f"the autoencoder was made from another base: the {name} of its lower levels' details is not "
                "that of the pipeline's VAE, on which its transformer was tuned"
            )


def _check_same_weights(ours: nn.Module, theirs: nn.Module, *, whole: bool) -> None:
    """The frozen part must be the pipeline's own VAE; without its decoder (not ``whole``) the rest of it."""
    mine, other = ours.state_dict(), theirs.state_dict()
    if not whole:
        other = {name: value for name, value in other.items() if name in mine}
    if mine.keys() != other.keys():
        raise DavaeError(
            f"the autoencoder's base has other layers than the pipeline's VAE: {min(mine.keys() ^ other.keys())}"
        )
    for name, value in other.items():
        if mine[name].shape != value.shape:
            raise DavaeError(
                f"the autoencoder was made from another base VAE: '{name}' has shape {tuple(mine[name].shape)}, "
                f"the pipeline's {tuple(value.shape)}"
            )
        if not _equal(mine[name], value):
            raise DavaeError(
                f"the autoencoder was made from another base VAE: '{name}' differs from the pipeline's. "
                "Train the autoencoder with AutoencoderDA.from_base(pipe.vae, ...)"
            )


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Equal in the narrower of the two dtypes."""
    narrow = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(ours.to(narrow), theirs.to(device=ours.device, dtype=narrow))
