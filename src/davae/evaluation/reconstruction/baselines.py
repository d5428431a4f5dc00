"""An autoencoder's reconstructions compared with baselines."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.metrics.image_set import ImageSet, compare_sets
from davae.evaluation.metrics.names import (
    BASE_ENLARGED,
    BASE_NATIVE,
    DECODER_ALONE,
    REDUCED,
    SPECTRAL_GAIN,
    UPGRADED,
    alone,
)
from davae.evaluation.metrics.psnr_ssim import PairMeans, Perceptual, psnr
from davae.evaluation.reconstruction.crops import FINE_TEXTURE, fine_texture
from davae.evaluation.reconstruction.details import MEANING as DETAIL_ROWS
from davae.evaluation.reconstruction.details import OtherDetails
from davae.evaluation.upscalers import Upscaler
from davae.models import AutoencoderDA
from davae.models.latent_space import decode, encode
from davae.runtime.devices import timed
from davae.runtime.resizing import upscaled

_MEANING = {
    UPGRADED: "the autoencoder itself",
    DECODER_ALONE: "its joint decoder on the base latent, without details: equal tokens",
    BASE_ENLARGED: "the base latent decoded by the base at base resolution, enlarged bicubically: equal tokens",
    BASE_NATIVE: "the base autoencoder at full resolution: more tokens",
    REDUCED: "no autoencoder: the image at base resolution, enlarged bicubically",
}


@dataclass
class Row:
    """One way to reconstruct images.

    Attributes:
        meaning: description.
        positions: latent positions of an image, relative to the autoencoder; 0 if nothing is encoded.
        seconds: of decoding an image from its latent, median over the batches (without the first of several); None
            where nothing is decoded, or with other details.
        figures: means by metric, and distances between the sets.
        crops: means by metric, by name of the set of crops.
        unavailable: reasons for missing metrics, by name.
    """

    meaning: str
    positions: float
    seconds: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    crops: dict[str, dict[str, float]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReconstructionReport:
    """The result of :func:`compare_reconstructions`.

    Attributes:
        images: their number; ``crops``: the number of crops by name.
        scale: full over base resolution.
        rows: by name; the first is the autoencoder.
        networks: preprocessing and weights of each feature network.
        perceptual: the same of each perceptual distance, by name.
        reference: hashes of the images' 8-bit pixels and of the moments of their features.
        upscalers: what each upscaler is, by name.
        autoencoder, data, resolution, dtype: what was measured, if given by name, and the type of its weights.
        unavailable: reasons for metrics that are missing in some row.
    """

    images: int
    crops: dict[str, int]
    scale: int
    rows: dict[str, Row]
    networks: list[dict[str, Any]]
    perceptual: dict[str, dict[str, Any]]
    reference: dict[str, Any]
    upscalers: dict[str, dict[str, Any]] = field(default_factory=dict)
    autoencoder: str | None = None
    data: str | None = None
    resolution: int | None = None
    dtype: str | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures of each row, followed by those of its crops."""
        shown: dict[str, dict[str, float]] = {}
        for name, row in self.rows.items():
            shown[name] = {"latent positions, relative": row.positions}
            shown[name] |= {} if row.seconds is None else {"seconds to decode an image": row.seconds}
            shown[name] |= row.figures
            for crop, figures in row.crops.items():
                shown[name] |= {f"{crop}: {metric}": value for metric, value in figures.items()}
        return shown

    def meanings(self) -> dict[str, str]:
        """What each row is, by name."""
        return {name: row.meaning for name, row in self.rows.items()}


@torch.no_grad()
def compare_reconstructions(
    vae: AutoencoderDA,
    batches: Iterable[Tensor],
    *,
    beside: Mapping[str, AutoencoderDA] | None = None,
    upscalers: Mapping[str, Upscaler] | None = None,
    crops: dict[str, Iterable[Tensor]] | None = None,
    networks: list[FeatureNetwork] | None = None,
    perceptual: Mapping[str, Perceptual] | None = None,
    of_base: bool = True,
) -> ReconstructionReport:
    """Reconstruct images in every way and measure each.

    The squares of fine texture are found in the images (`davae.evaluation.reconstruction.crops`) and cut out of their
    reconstructions; all other crops are images of their own, without rows of other details.

    Args:
        vae: in any mode; used in evaluation mode, with the mean of its posterior.
        batches: images ``[B, 3, H, W]`` in [-1, 1], all of one size.
        beside: other autoencoders by the name of their row. One with details has a second row, ``NAME, decoder alone``.
        upscalers: what enlarges the base's image, by the name of its row; image ``i`` has the seed ``i``.
        crops: name to images ``[1, 3, H, W]`` of any sizes, reported separately.
        networks: for Fréchet and kernel distances.
        perceptual: further distances of each pair by name, such as LPIPS.
        of_base: with the rows that training leaves as they are: of the base, of upscalers and of the reduced image.

    Raises:
        DavaeError: no image, sizes that do not fit the autoencoder, a name that a row has already, or upscalers where
            the base's decoder was dropped.
    """
    networks, perceptual, beside, upscalers = networks or [], perceptual or {}, beside or {}, upscalers or {}
    training = {model: model.training for model in (vae, *beside.values())}
    for model in training:
        model.eval()
    rows = _rows(vae, beside, upscalers, of_base=of_base)
    real = ImageSet(networks)
    made = {name: ImageSet(networks) for name in rows}
    means = {name: PairMeans(perceptual) for name in rows}
    textures = {name: PairMeans(perceptual) for name in rows}
    times: dict[str, list[float]] = {}
    for images, reconstructions in _reconstructions(vae, batches, beside, upscalers, times, of_base=of_base):
        if UPGRADED in reconstructions:
            real.update(images)
        cut = fine_texture(images)
        for name, ours in reconstructions.items():
            made[name].update(ours)
            means[name].update(images, ours)
            textures[name].update(cut(images), cut(ours))
    if real.count == 0:
        raise DavaeError("there is no image to reconstruct")
    rows = {name: row for name, row in rows.items() if made[name].count}
    for name, row in rows.items():
        row.seconds = median(times[name][1:] or times[name]) if row.positions and name in times else None
        row.figures |= means[name].figures()
        row.crops[FINE_TEXTURE] = textures[name].figures()
        if real.count > 1:
            distances = compare_sets(made[name], real)
            row.figures |= {k: v for k, v in distances.figures.items() if not k.startswith("inception_score")}
            row.figures |= _gains(made[name], real)
            row.unavailable |= distances.unavailable
    counts = {FINE_TEXTURE: real.count}
    for crop, images_of in (crops or {}).items():
        apart = {name: PairMeans(perceptual) for name in rows if name not in DETAIL_ROWS}
        for images in images_of:
            for name, ours in all_reconstructions(vae, images, beside, upscalers, of_base=of_base).items():
                apart[name].update(images, ours)
        counts[crop] = apart[UPGRADED].count
        if not counts[crop]:
            raise DavaeError(f"there is no image among the crops '{crop}'")
        for name, found in apart.items():
            rows[name].crops[crop] = found.figures()
    for model, mode in training.items():
        model.train(mode)
    return ReconstructionReport(
        images=real.count,
        crops=counts,
        scale=vae.scale,
        rows=rows,
        networks=[network.describe() for network in networks],
        perceptual={name: distance.describe() for name, distance in perceptual.items()},
        reference=real.hashes(),
        upscalers={name: upscaler.describe() for name, upscaler in upscalers.items()},
    )


def _gains(made: ImageSet, real: ImageSet) -> dict[str, float]:
    assert made.spectrum is not None
    assert real.spectrum is not None
    gains = made.spectrum.gains(real.spectrum)
    return {f"{SPECTRAL_GAIN}/octave{number}": gain for number, gain in enumerate(gains)}


def _rows(
    vae: AutoencoderDA, beside: Mapping[str, AutoencoderDA], upscalers: Mapping[str, Upscaler], *, of_base: bool
) -> dict[str, Row]:
    """The rows without figures, in their order; those of the base only if its decoder was not dropped."""
    given = [*beside, *upscalers]
    taken = {*_MEANING, *DETAIL_ROWS, *map(alone, beside), *(name for name in given if given.count(name) > 1)}
    if wrong := [name for name in given if name in taken]:
        raise DavaeError(f"'{wrong[0]}' names a row that the report has already: call what you set beside it otherwise")
    if upscalers and not vae.config.has_base_decoder:
        raise DavaeError(
            "upscalers enlarge the base's image, and this autoencoder has dropped the base's decoder: leave them out, "
            "or evaluate one that has it"
        )
    meaning, shares = _MEANING | DETAIL_ROWS, dict[str, float]()
    for name, model in {UPGRADED: vae, **beside}.items():
        shares[name] = (vae.spatial_compression / model.spatial_compression) ** 2
        trained_so = "" if model.uses_details else ", a joint decoder trained without details"
        meaning.setdefault(name, f"another autoencoder{trained_so}")
        if model.uses_details:
            shares[alone(name)] = shares[name]
            meaning.setdefault(alone(name), f"the joint decoder of '{name}' on the base latent, without details")
    if of_base and vae.config.has_base_decoder:
        shares |= {BASE_ENLARGED: 1.0, **dict.fromkeys(upscalers, 1.0), BASE_NATIVE: float(vae.scale**2)}
        meaning |= {name: f"the base's image enlarged by {found.title}" for name, found in upscalers.items()}
    if of_base:
        shares[REDUCED] = 0.0
    if vae.uses_details:
        shares |= dict.fromkeys(DETAIL_ROWS, 1.0)
    return {name: Row(meaning[name], share) for name, share in shares.items()}


def _reconstructions(
    vae: AutoencoderDA,
    batches: Iterable[Tensor],
    beside: Mapping[str, AutoencoderDA],
    upscalers: Mapping[str, Upscaler],
    times: dict[str, list[float]],
    *,
    of_base: bool,
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Images and their reconstructions by name; every image comes once with each row.

    Seconds per image are added to ``times``, by row and batch.
    """
    details, count = OtherDetails(vae), 0
    for images in batches:
        made = {}
        for name, way in _ways(vae, images, beside, upscalers, count, of_base=of_base).items():
            made[name], seconds = timed(way)
            times.setdefault(name, []).append(seconds / len(images))
        count += len(images)
        yield images, {name: _finished(image) for name, image in made.items()}
        if vae.uses_details:
            yield from details.of(images)
    yield from details.rest()


@torch.no_grad()
def all_reconstructions(
    vae: AutoencoderDA,
    images: Tensor,
    beside: Mapping[str, AutoencoderDA] | None = None,
    upscalers: Mapping[str, Upscaler] | None = None,
    *,
    of_base: bool = True,
) -> dict[str, Tensor]:
    """Reconstructions ``[B, 3, H, W]`` by name of their row, float32 on the CPU, but for those with other details."""
    ways = _ways(vae, images, beside or {}, upscalers or {}, 0, of_base=of_base)
    return {name: _finished(way()) for name, way in ways.items()}


def _finished(image: Tensor) -> Tensor:
    return image.float().clamp(-1, 1).cpu()


def _ways(
    vae: AutoencoderDA,
    images: Tensor,
    beside: Mapping[str, AutoencoderDA],
    upscalers: Mapping[str, Upscaler],
    first: int,
    *,
    of_base: bool,
) -> dict[str, Callable[[], Tensor]]:
    """What makes the reconstructions ``[B, 3, H, W]``, by name of their row, of latents that are encoded here.

    Args:
        vae, beside, upscalers, of_base: as for :func:`compare_reconstructions`.
        images: ``[B, 3, H, W]`` in [-1, 1].
        first: number of the first image.
    """
    size = (images.shape[-2], images.shape[-1])
    x = images.to(vae.device, vae.dtype)
    ways: dict[str, Callable[[], Tensor]] = {}
    for name, model in {UPGRADED: vae, **beside}.items():
        latent = encode(model, x)
        ways[name] = partial(decode, model, latent)
        if model.uses_details:
            ways[alone(name)] = partial(model.decode_alone, model.layout.split(latent)[0])
    if not of_base:
        return ways
    if vae.config.has_base_decoder:
        z = vae.encode_base(x)

        def small() -> Tensor:
            return vae.decode_base(z).float().clamp(-1, 1)

        ways[BASE_ENLARGED] = lambda: upscaled(small(), size)
        seeds = range(first, first + len(images))
        ways |= {name: partial(_enlarged, upscaler, small, size, seeds) for name, upscaler in upscalers.items()}
        ways[BASE_NATIVE] = partial(decode, vae.base_vae, encode(vae.base_vae, x))
    ways[REDUCED] = lambda: upscaled(vae.downsample(x), size)
    return ways


def _enlarged(upscaler: Upscaler, small: Callable[[], Tensor], size: tuple[int, int], seeds: range) -> Tensor:
    return upscaler(small(), size, seeds=seeds)


@dataclass(frozen=True)
class OneReconstruction:
    """One way in which a single image was reconstructed.

    Attributes:
        image: ``[3, H, W]`` in [-1, 1].
        psnr: in dB.
        positions: latent positions of the image; 0 if nothing is encoded.
    """

    image: Tensor
    psnr: float
    positions: int


@torch.no_grad()
def reconstruct_one(vae: AutoencoderDA, image: Tensor) -> dict[str, OneReconstruction]:
    """An image ``[1, 3, H, W]`` in [-1, 1] in every way by name, but for those with other details.

    Raises:
        DavaeError: sides that are no multiples of the autoencoder's compression.
    """
    made = all_reconstructions(vae, image)
    grid = image.shape[-2] * image.shape[-1] // vae.spatial_compression**2
    rows = _rows(vae, {}, {}, of_base=True)
    return {
        name: OneReconstruction(found[0], float(psnr(image, found)), round(rows[name].positions * grid))
        for name, found in made.items()
    }
