"""Reconstruction quality and speed of autoencoders on the same images."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.benchmark import side_by_side
from davae.data.cache import weights_hash
from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.metrics.image_set import ImageSet, compare_sets
from davae.evaluation.metrics.names import BASE_ENLARGED, alone
from davae.evaluation.metrics.psnr_ssim import PairMeans, Perceptual
from davae.evaluation.upscalers import Upscaler
from davae.models import AutoencoderDA
from davae.models.latent_space import compression_of, decode, encode, open_autoencoder
from davae.pipelines.saving.opening import opening
from davae.runtime.pixel_budget import in_parts
from davae.runtime.resizing import upscaled

_SMALLEST = 16  # pixels, for SSIM's window and the Wasserstein pyramid


@dataclass(frozen=True)
class Candidate:
    """One autoencoder in the comparison.

    Attributes:
        name: its title in tables.
        model: in eval mode on the device.
        compression: pixels per latent position, along a side.
        channels: of the latent.
        patch: latent positions per token, along a side.
        tokens: per image.
        parameters: of all that encodes and decodes.
        kind: class of the model, or what stands behind it.
        latents_of: name of the candidate before it that has the same latents, for which one transformer is enough.
        enlarge: makes the images of base latents in place of the model's decoder, ``[B, 3, H, W]`` in [-1, 1].
    """

    name: str
    model: ModelMixin
    compression: int
    channels: int
    patch: int
    tokens: int
    kind: str
    parameters: int
    latents_of: str | None = None
    enlarge: Callable[[Tensor], Tensor] | None = None

    def encode(self, images: Tensor) -> Tensor:
        """Raw (unscaled) latents of images ``[B, 3, H, W]``."""
        return encode(self.model, images.to(self.model.device))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` of raw latents."""
        if self.enlarge is not None:
            return self.enlarge(latents.to(self.model.device, self.model.dtype))
        return decode(self.model, latents)


@dataclass(frozen=True)
class AutoencoderScore:
    """Measurements of one autoencoder.

    Attributes:
        name: of the candidate.
        kind: of the candidate.
        compression, channels, patch, tokens: see :class:`Candidate`.
        parameters: of the whole model.
        figures: means over the images, and distances between images and reconstructions (``fid/NETWORK`` is rFID),
            under the names of :mod:`davae.evaluation.metrics.names`.
        encode_images_per_second, decode_images_per_second: from median times, measured alternately.
        dtype: of its weights.
    """

    name: str
    kind: str
    compression: int
    channels: int
    patch: int
    tokens: int
    parameters: int
    figures: dict[str, float]
    encode_images_per_second: float
    decode_images_per_second: float
    dtype: str = "float32"


def open_candidates(
    autoencoders: Mapping[str, str | Path | ModelMixin],
    resolution: int,
    *,
    tokens: int | None = None,
    upscalers: Mapping[str, Upscaler] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | Literal["saved"] = "saved",
) -> list[Candidate]:
    """Open autoencoders for images of one size.

    Behind each :class:`AutoencoderDA` with details comes its decoder alone, and behind them all what else makes a
    large image of the first one's base latents: the base, enlarged, and upscalers.

    Args:
        autoencoders: folder or model by name.
        resolution: side of the image in pixels.
        tokens: tokens per image for all, reached by the patch size; by default patch size 1, so that the number of
            tokens follows from the compression.
        upscalers: what enlarges the base's images, by name; image ``i`` of a batch has the seed ``i``.
        device: where to measure.
        dtype: of the weights of those in folders; ``saved`` is that of the files.

    Raises:
        DavaeError: an autoencoder cannot be read, its compression does not divide the resolution, no patch size gives
            ``tokens``, two columns have one name, or there are upscalers and no :class:`AutoencoderDA` with details
            whose base's images they could enlarge.
    """
    if not autoencoders:
        raise DavaeError("no autoencoder to compare: give NAME=FOLDER")
    if resolution < _SMALLEST:
        raise DavaeError(f"a resolution of {resolution} is too small to compare at: at least {_SMALLEST} pixels")
    found: list[Candidate] = []
    bases: dict[str, str] = {}  # the first candidate on the latents of a base, by what they depend on
    upgraded: AutoencoderDA | None = None
    for name, given in autoencoders.items():
        model: Any = given
        if isinstance(given, str | Path):
            with opening("autoencoder", str(given)):
                model = open_autoencoder(given, dtype=dtype)
        found.append(_candidate(name, model, resolution, tokens, device))
        if isinstance(model, AutoencoderDA) and model.uses_details:
            upgraded = upgraded or model
            config = model.config
            base = f"{weights_hash(model.base_vae)} {model.scale} {config.antialias} {config.clamp_base_image}"
            found.append(
                replace(
                    _candidate(alone(name), model.without_details(), resolution, tokens, device),
                    latents_of=bases.get(base),
                )
            )
            bases.setdefault(base, alone(name))
    if upgraded is not None and upgraded.config.has_base_decoder:
        found += _enlarging(upgraded, next(c for c in found if c.name in bases.values()), upscalers or {})
    elif upscalers:
        raise DavaeError(
            "upscalers enlarge the images of an upgraded autoencoder's base: compare an AutoencoderDA with details and "
            "its base's decoder, or leave them out"
        )
    names = [candidate.name for candidate in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise DavaeError(f"'{twice[0]}' is the name of two columns: call one otherwise")
    return found


def _candidate(name: str, model: Any, resolution: int, tokens: int | None, device: torch.device | str) -> Candidate:
    compression = compression_of(model)
    if resolution % compression:
        nearest = max(1, round(resolution / compression)) * compression
        raise DavaeError(
            f"{name}: {resolution} pixels are not a multiple of its compression, {compression}; "
            f"the nearest is {nearest}"
        )
    grid = resolution // compression
    patch = _patch(name, grid, tokens)
    return Candidate(
        name=name,
        model=model.eval().requires_grad_(False).to(device),
        compression=compression,
        channels=int(model.config.latent_channels),
        patch=patch,
        tokens=(grid // patch) ** 2,
        kind=type(model).__name__,
        parameters=_parameters(model),
    )


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _enlarging(vae: AutoencoderDA, without: Candidate, upscalers: Mapping[str, Upscaler]) -> list[Candidate]:
    """The base's images, enlarged bicubically and by upscalers, of the latents of its decoder alone ``without``."""

    def size(latents: Tensor) -> tuple[int, int]:
        return latents.shape[-2] * without.compression, latents.shape[-1] * without.compression

    def small(latents: Tensor) -> Tensor:
        return vae.decode_base(latents).float().clamp(-1, 1)

    def bicubic(latents: Tensor) -> Tensor:
        return upscaled(small(latents), size(latents))

    def by(upscaler: Upscaler, latents: Tensor) -> Tensor:
        return upscaler(small(latents), size(latents), seeds=range(len(latents)))

    ways = {BASE_ENLARGED: bicubic} | {name: partial(by, upscaler) for name, upscaler in upscalers.items()}
    source = without.latents_of or without.name
    kinds = {BASE_ENLARGED: type(vae.base_vae).__name__} | {name: found.kind for name, found in upscalers.items()}
    counts = dict.fromkeys(ways, _parameters(vae.base_vae))
    counts |= {name: counts[name] + found.parameters for name, found in upscalers.items()}
    return [
        replace(without, name=name, kind=kinds[name], parameters=counts[name], latents_of=source, enlarge=way)
        for name, way in ways.items()
    ]


def _patch(name: str, grid: int, tokens: int | None) -> int:
    if tokens is None:
        return 1
    for patch in range(1, grid + 1):
        if grid % patch == 0 and (grid // patch) ** 2 == tokens:
            return patch
    raise DavaeError(
        f"{name}: its latent of {grid} x {grid} cannot be divided into {tokens} tokens; possible are "
        f"{', '.join(str((grid // p) ** 2) for p in range(1, grid + 1) if grid % p == 0)}"
    )


def encode_all(candidate: Candidate, images: Tensor) -> Tensor:
    """Raw (unscaled) latents of all images, float32 ``[N, C, h, w]`` on the CPU."""
    return torch.cat([candidate.encode(part).float().cpu() for part in in_parts(images)])


def decode_all(candidate: Candidate, latents: Tensor) -> Tensor:
    """Images of raw latents, clamped to [-1, 1], float32 ``[N, 3, H, W]`` on the CPU."""
    parts = in_parts(latents, candidate.compression)
    return torch.cat([candidate.decode(part).float().cpu().clamp(-1, 1) for part in parts])


def score_autoencoders(
    candidates: Sequence[Candidate],
    images: Tensor,
    *,
    batch: int = 8,
    repeats: int = 5,
    networks: Sequence[FeatureNetwork] = (),
    perceptual: Mapping[str, Perceptual] | None = None,
) -> tuple[list[AutoencoderScore], dict[str, Tensor]]:
    """Reconstruct the same images with each autoencoder and measure quality and speed.

    Args:
        candidates: see :func:`open_candidates`.
        images: ``[N, 3, R, R]`` in [-1, 1].
        batch: images at a time, also for timing.
        repeats: rounds of timing.
        networks: for feature distances.
        perceptual: further distances of each pair by name, such as LPIPS.

    Returns:
        One row each, and the reconstructions by name.

    Raises:
        DavaeError: an autoencoder's output has another size than its input.
    """
    real = ImageSet(networks).extend(images.split(batch))
    part = images[:batch]
    encoders = {c.name: partial(c.encode, part.to(c.model.device)) for c in candidates}
    latents: dict[str, Tensor] = {}
    for c in candidates:
        latents[c.name] = encode_all(c, images) if c.latents_of is None else latents[c.latents_of]
    decoders = {c.name: partial(c.decode, latents[c.name][:batch].to(c.model.device)) for c in candidates}
    encoded, decoded = side_by_side(encoders, repeats).medians, side_by_side(decoders, repeats).medians
    rows, made = [], {}
    for c in candidates:
        again = made[c.name] = decode_all(c, latents[c.name])
        if again.shape != images.shape:
            raise DavaeError(
                f"{c.name} returns images of {again.shape[-2]} x {again.shape[-1]} for {images.shape[-2]} x "
                f"{images.shape[-1]}: its compression is not {c.compression}, as its configuration says"
            )
        rows.append(
            AutoencoderScore(
                name=c.name,
                kind=c.kind,
                compression=c.compression,
                channels=c.channels,
                patch=c.patch,
                tokens=c.tokens,
                parameters=c.parameters,
                figures=_figures(images, again, real, batch, perceptual or {}),
                encode_images_per_second=len(part) / encoded[c.name],
                decode_images_per_second=len(part) / decoded[c.name],
                dtype=str(c.model.dtype).removeprefix("torch."),
            )
        )
    return rows, made


def _figures(
    images: Tensor, again: Tensor, real: ImageSet, batch: int, perceptual: Mapping[str, Perceptual]
) -> dict[str, float]:
    means, made = PairMeans(perceptual), ImageSet(real.networks)
    for part, ours in zip(images.split(batch), again.split(batch), strict=True):
        means.update(part, ours)
        made.update(ours)
    return means.figures() | compare_sets(made, real).figures
