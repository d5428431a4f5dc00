"""What autoencoders keep of the same images, and how fast they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.benchmark import side_by_side
from davae.errors import DavaeError
from davae.evaluation import log_spectral_distance, psnr, sliced_wasserstein, ssim
from davae.evaluation.features import FeatureNetwork
from davae.models.any_autoencoder import compression_of, decode_raw, encode_mode, open_autoencoder
from davae.pipelines.saving.opening import opening
from davae.training.compare.distances import FeatureReference

_SMALLEST = 16  # pixels: of SSIM's window and the Wasserstein pyramid


@dataclass(frozen=True)
class Contender:
    """One autoencoder in the comparison.

    Attributes:
        name: what it is called in tables.
        model: in eval mode on the device.
        compression: pixels a latent position, a side.
        channels: of the latent.
        patch: latent positions a token, a side.
        tokens: of an image.
    """

    name: str
    model: ModelMixin
    compression: int
    channels: int
    patch: int
    tokens: int


@dataclass(frozen=True)
class AutoencoderScore:
    """Measurements of one autoencoder.

    Attributes:
        name: of the contender.
        kind: class of the model.
        compression, channels, patch, tokens: see :class:`Contender`.
        parameters: of the whole model.
        psnr: dB, mean over images.
        ssim: mean over images.
        swd: sliced Wasserstein distance to the images at the finest level.
        spectrum_db: distance of the radial power spectra, dB.
        encode_images_per_second, decode_images_per_second: medians, all autoencoders measured in turns.
        lpips: mean over images; None without the weights.
        distances: of the reconstructions to the images by feature networks, such as ``fid/inception`` (rFID).
    """

    name: str
    kind: str
    compression: int
    channels: int
    patch: int
    tokens: int
    parameters: int
    psnr: float
    ssim: float
    swd: float
    spectrum_db: float
    encode_images_per_second: float
    decode_images_per_second: float
    lpips: float | None = None
    distances: dict[str, float] = field(default_factory=dict)


def open_contenders(
    autoencoders: Mapping[str, str | Path | ModelMixin],
    resolution: int,
    *,
    tokens: int | None = None,
    device: torch.device | str = "cpu",
) -> list[Contender]:
    """Open autoencoders for images of one size.

    Args:
        autoencoders: name -> folder or model.
        resolution: side of the image in pixels.
        tokens: one budget for all, reached by the patch size; None takes patch 1, so that the tokens follow the
            compression.
        device: where to measure.

    Raises:
        DavaeError: an autoencoder that cannot be read, a compression that does not divide the resolution, or a budget
            out of reach.
    """
    if not autoencoders:
        raise DavaeError("there is no autoencoder to compare: give NAME=FOLDER")
    if resolution < _SMALLEST:
        raise DavaeError(
            f"a resolution of {resolution} is too small to compare at: at least {_SMALLEST} pixels"
        )
    found = []
    for name, given in autoencoders.items():
        model: Any = given
        if isinstance(given, str | Path):
            with opening("autoencoder", str(given)):
                model = open_autoencoder(given)
        compression = compression_of(model)
        if resolution % compression:
            nearest = max(1, round(resolution / compression)) * compression
            raise DavaeError(
                f"{name}: {resolution} pixels are not a multiple of its compression, {compression}; "
                f"the nearest is {nearest}"
            )
        grid = resolution // compression
        patch = _patch(name, grid, tokens)
        found.append(
            Contender(
                name=name,
                model=model.eval().requires_grad_(False).to(device),
                compression=compression,
                channels=int(model.config.latent_channels),
                patch=patch,
                tokens=(grid // patch) ** 2,
            )
        )
    return found


def _patch(name: str, grid: int, tokens: int | None) -> int:
    if tokens is None:
        return 1
    for patch in range(1, grid + 1):
        if grid % patch == 0 and (grid // patch) ** 2 == tokens:
            return patch
    raise DavaeError(
        f"{name}: its latent of {grid} x {grid} cannot be cut into {tokens} tokens: with whole patches it has "
        f"{', '.join(str((grid // p) ** 2) for p in range(1, grid + 1) if grid % p == 0)}"
    )


def encode_all(contender: Contender, images: Tensor, batch: int) -> Tensor:
    """Raw latents of all images, on the CPU: [N, C, h, w]."""
    return torch.cat([encode_mode(contender.model, part).float().cpu() for part in images.split(batch)])


def decode_all(contender: Contender, latents: Tensor, batch: int) -> Tensor:
    """Images of raw latents, clamped, on the CPU: [N, 3, H, W]."""
    made = [decode_raw(contender.model, part).float().cpu().clamp(-1, 1) for part in latents.split(batch)]
    return torch.cat(made)


def score_autoencoders(
    contenders: Sequence[Contender],
    images: Tensor,
    *,
    batch: int = 8,
    repeats: int = 5,
    networks: Sequence[FeatureNetwork] = (),
    lpips: nn.Module | None = None,
) -> tuple[list[AutoencoderScore], dict[str, Tensor]]:
    """Reconstruct the same images with each and measure.

    Args:
        contenders: see :func:`open_contenders`.
        images: [N, 3, R, R] in [-1, 1].
        batch: images at a time, also where time is taken.
        repeats: rounds of the timing.
        networks: for distances of features.
        lpips: from two batches to their mean distance, see :class:`davae.training.perceptual.LpipsLoss`.

    Returns:
        One row each, and the reconstructions by name.
    """
    real = FeatureReference(networks, images, batch)
    part = images[:batch]
    encoders = {c.name: partial(encode_mode, c.model, part.to(c.model.device)) for c in contenders}
    latents = {c.name: encode_all(c, images, batch) for c in contenders}
    decoders = {
        c.name: partial(decode_raw, c.model, latents[c.name][:batch].to(c.model.device)) for c in contenders
    }
    encoded, decoded = side_by_side(encoders, repeats).medians, side_by_side(decoders, repeats).medians
    rows, made = [], {}
    for c in contenders:
        again = made[c.name] = decode_all(c, latents[c.name], batch)
        if again.shape != images.shape:
            raise DavaeError(
                f"{c.name} gives images of {again.shape[-2]} x {again.shape[-1]} for {images.shape[-2]} x "
                f"{images.shape[-1]}: its compression is not the {c.compression} that its configuration tells"
            )
        rows.append(
            AutoencoderScore(
                name=c.name,
                kind=type(c.model).__name__,
                compression=c.compression,
                channels=c.channels,
                patch=c.patch,
                tokens=c.tokens,
                parameters=sum(p.numel() for p in c.model.parameters()),
                psnr=float(psnr(images, again).mean()),
                ssim=float(ssim(images, again).mean()),
                swd=next(iter(sliced_wasserstein(again, images).values())),
                spectrum_db=log_spectral_distance(again, images),
                encode_images_per_second=len(part) / encoded[c.name],
                decode_images_per_second=len(part) / decoded[c.name],
                lpips=None if lpips is None else _mean_lpips(lpips, images, again, batch),
                distances=real.distances(again),
            )
        )
    return rows, made


@torch.no_grad()
def _mean_lpips(lpips: nn.Module, images: Tensor, again: Tensor, batch: int) -> float:
    pairs = zip(images.split(batch), again.split(batch), strict=True)
    return sum(float(lpips(a, b)) * len(a) for a, b in pairs) / len(images)
