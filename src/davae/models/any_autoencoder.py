"""Any image autoencoder of diffusers or of davae, used in one way: opened, encoded with, decoded with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import DavaeError
from davae.models.autoencoder_da import AutoencoderDA
from davae.models.dc_ae import PlainAutoencoderDC
from davae.models.ldm_autoencoder import LDMAutoencoderKL

_OURS = {cls.__name__: cls for cls in (AutoencoderDA, LDMAutoencoderKL, PlainAutoencoderDC)}


def open_autoencoder(folder: str | Path) -> ModelMixin:
    """The autoencoder of a folder, or of a pipeline's folder, in eval mode.

    Raises:
        DavaeError: there is none, or its class is not known.
    """
    folder = Path(folder)
    place = folder if (folder / "config.json").is_file() else folder / "vae"
    if not (place / "config.json").is_file():
        raise DavaeError(
            f"{folder} is no autoencoder's folder: there is no config.json in it, nor in its vae/"
        )
    name = str(json.loads((place / "config.json").read_text(encoding="utf-8")).get("_class_name"))
    model_class = _OURS.get(name) or getattr(diffusers, name, None)
    if model_class is None or not name.startswith(("Autoencoder", *_OURS)):
        raise DavaeError(f"{place} holds a {name}: expected an autoencoder of diffusers or of davae")
    return model_class.from_pretrained(place).eval()


def compression_of(model: ModelMixin) -> int:
    """Image pixels a latent position, a side.

    Raises:
        DavaeError: the configuration does not tell.
    """
    for name in ("spatial_compression", "spatial_compression_ratio"):
        if isinstance(getattr(model, name, None), int):
            return int(getattr(model, name))
    config: Any = model.config
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not widths:
        raise DavaeError(f"the configuration of {type(model).__name__} does not tell its compression")
    return int(2 ** (len(widths) - 1))


@torch.no_grad()
def encode_mode(model: ModelMixin, images: Tensor) -> Tensor:
    """Raw latents [B, C, h, w] of images [B, 3, H, W] in [-1, 1]; of a random posterior its mode."""
    encoded: Any = model.encode(images.to(model.device, model.dtype))
    if hasattr(encoded, "latent_dist"):
        return encoded.latent_dist.mode()
    return encoded.latents if hasattr(encoded, "latents") else encoded.latent  # TAESD's, DC-AE's


@torch.no_grad()
def decode_raw(model: ModelMixin, latents: Tensor) -> Tensor:
    """Images [B, 3, H, W], about in [-1, 1], of raw latents [B, C, h, w]."""
    return model.decode(latents.to(model.device, model.dtype)).sample
