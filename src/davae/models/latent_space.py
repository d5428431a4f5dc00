"""The latent space of any image autoencoder of diffusers or davae: loading, encoding, decoding, scaling.

There are images ``[B, 3, H, W]`` in [-1, 1]; *raw* latents ``[B, C, h, w]``, which the autoencoder
encodes to and decodes from; and *model space*, ``(raw - shift) * scale``, which a diffusion model sees. For registered
video autoencoders these are single frames, without the frame axis.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import latent_affine, to_raw, to_scaled
from davae.models.autoencoder.autoencoder_da import AutoencoderDA
from davae.models.base_adapters.adapter import BaseAdapter, adapter_of
from davae.models.base_adapters.image import LDMAutoencoderKL
from davae.models.dc_ae import PlainAutoencoderDC
from davae.runtime.devices import saved_dtype
from davae.runtime.model_files import open_model
from davae.runtime.text_files import read_object

_OURS = {cls.__name__: cls for cls in (AutoencoderDA, LDMAutoencoderKL, PlainAutoencoderDC)}


def open_autoencoder(folder: str | Path, *, dtype: torch.dtype | Literal["saved"] = torch.float32) -> ModelMixin:
    """Load the autoencoder in a folder, or in the ``vae`` subfolder of a pipeline, in eval mode.

    Args:
        folder: of the autoencoder or the pipeline.
        dtype: of the weights; ``saved`` is that of the folder's files.

    Raises:
        DavaeError: there is none, its class is unknown, or its weights are not complete and finite.
    """
    folder = Path(folder)
    path = folder if (folder / "config.json").is_file() else folder / "vae"
    if not (path / "config.json").is_file():
        raise DavaeError(f"{folder} holds no autoencoder: there is no config.json in it or in its vae/")
    name = str(read_object(path / "config.json").get("_class_name"))
    model_class = autoencoder_class(name)
    if model_class is None:
        raise DavaeError(f"{path} holds a {name}: expected an autoencoder of diffusers or of davae")
    wanted = saved_dtype(path) if dtype == "saved" else dtype
    return open_model(model_class.from_pretrained, path, dtype=wanted)[0].eval()


def autoencoder_class(name: str) -> type[ModelMixin] | None:
    """The autoencoder class of davae or diffusers with that name; None if there is none."""
    if not name.startswith(("Autoencoder", *_OURS)):
        return None
    return _OURS.get(name) or getattr(diffusers, name, None)


def compression_of(model: ModelMixin) -> int:
    """Image pixels per latent position along each side.

    Raises:
        DavaeError: neither the model nor its configuration states it.
    """
    for name in ("spatial_compression", "spatial_compression_ratio"):
        if isinstance(getattr(model, name, None), int):
            return int(getattr(model, name))
    config: Any = model.config
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not widths:
        raise DavaeError(f"the configuration of {type(model).__name__} does not state its spatial compression")
    return int(2 ** (len(widths) - 1))


@torch.no_grad()
def encode(model: ModelMixin, images: Tensor, *, details_seed: int | None = None) -> Tensor:
    """Raw latents ``[B, C, h, w]`` of images ``[B, 3, H, W]`` in [-1, 1]: the mode of the posterior, if there is one.

    For an :class:`AutoencoderDA` they are ``[B, C + D, h, w]`` in the pipelines' convention, details normalised.

    Args:
        model: the autoencoder.
        images: in [-1, 1].
        details_seed: for an :class:`AutoencoderDA`: draw the details. A draw depends on the seed and the image alone,
            not on the batch, the device or the process.

    Raises:
        DavaeError: ``model.encode`` returns no known kind of latent, or it has no details to draw.
    """
    given, images = images, images.to(model.device, model.dtype)
    if isinstance(model := getattr(model, "_orig_mod", model), AutoencoderDA):  # of torch.compile, too
        posterior = model.encode(images).latent_dist
        if details_seed is None:
            return posterior.mode()
        return posterior.sample([_generator_of(image, details_seed) for image in given])
    if details_seed is not None:
        raise DavaeError(f"{type(model).__name__} has no details to draw: only an AutoencoderDA has")
    return _adapter(model).encode(model, images)


def _generator_of(image: Tensor, seed: int) -> torch.Generator:
    pixels = image.detach().float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.sha256(seed.to_bytes(8, "little") + pixels).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@torch.no_grad()
def decode(model: ModelMixin, latents: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]``, approximately in [-1, 1], from raw latents as :func:`encode` gives them."""
    latents = latents.to(model.device, model.dtype)
    if isinstance(model := getattr(model, "_orig_mod", model), AutoencoderDA):  # of torch.compile, too
        return model.decode(latents).sample
    return _adapter(model).decode(model, latents)


@torch.no_grad()
def native_reconstruction(vae: AutoencoderDA, images: Tensor) -> Tensor:
    """Reconstructions of ``[B, 3, H, W]`` by the base autoencoder at full resolution, with ``s^2`` times the tokens."""
    return decode(vae.base_vae, encode(vae.base_vae, images))


def to_model_space(model: ModelMixin, latent: Tensor, *, shifted: bool = True) -> Tensor:
    """Raw latents ``[B, C, h, w]`` as a diffusion model sees them: ``(latent - shift) * scale``.

    Args:
        model: the autoencoder.
        latent: raw.
        shifted: False for pipelines that do not read ``shift_factor``; the shift is then 0.
    """
    return to_scaled(latent, *_affine(model, shifted))


def from_model_space(model: ModelMixin, latent: Tensor, *, shifted: bool = True) -> Tensor:
    """The inverse of :func:`to_model_space`: what :func:`decode` takes."""
    return to_raw(latent, *_affine(model, shifted))


def _affine(model: ModelMixin, shifted: bool) -> tuple[Tensor, Tensor]:
    if isinstance(model := getattr(model, "_orig_mod", model), AutoencoderDA):  # of torch.compile, too
        shift, scale = model.adapter.normalisation(model.base)
        details = latent_affine(model.config, model.layout.channels)
        shift, scale = (torch.cat([a, b[len(a) :]]) for a, b in zip((shift, scale), details))
    else:
        shift, scale = _adapter(model).normalisation(model)
    return (shift if shifted else torch.zeros_like(shift)), scale


class _Undescribed(BaseAdapter):
    """For autoencoders without an adapter: only what all of diffusers' classes have in common."""

    def detail_encoder(self, base: Any) -> Any:
        raise DavaeError(f"{type(base).__name__} has no adapter")

    joint_decoder = detail_encoder


def _adapter(model: ModelMixin) -> BaseAdapter:
    return adapter_of(model) or _Undescribed()
