"""An autoencoder's reconstructions compared with baselines."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.metrics.image_set import ImageSet, compare_sets
from davae.evaluation.metrics.names import SPECTRAL_GAIN
from davae.evaluation.metrics.psnr_ssim import PairMeans, Perceptual, psnr
from davae.evaluation.reconstruction.crops import FINE_TEXTURE, fine_texture
from davae.evaluation.reconstruction.details import MEANING as DETAIL_ROWS
from davae.evaluation.reconstruction.details import ZEROED, OtherDetails
from davae.models import AutoencoderDA
from davae.models.latent_space import native_reconstruction
from davae.runtime.pictures import upscaled

UPGRADED, BASE_UPSCALED, BASE_NATIVE, REDUCED = "upgraded", "base, upscaled", "base, native", "image, reduced"
_MEANING = {
    UPGRADED: "the autoencoder itself",
    BASE_UPSCALED: "the base latent alone, decoded at base resolution and enlarged bicubically: equal tokens",
    BASE_NATIVE: "the base autoencoder at full resolution: more tokens",
    REDUCED: "no autoencoder: the image at base resolution, enlarged bicubically",
}


@dataclass
class Row:
    """One way to reconstruct images.

    Attributes:
        meaning: description.
        positions: latent positions of an image, relative to the autoencoder; 0 if nothing is encoded.
        figures: means by metric, and distances between the sets.
        crops: means by metric, by name of the set of crops.
        unavailable: reasons for missing metrics, by name.
    """

    meaning: str
    positions: float
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
        autoencoder, data, resolution: what was measured, if given by name.
        unavailable: reasons for metrics that are missing in some row.
    """

    images: int
    crops: dict[str, int]
    scale: int
    rows: dict[str, Row]
    networks: list[dict[str, Any]]
    perceptual: dict[str, dict[str, Any]]
    reference: dict[str, Any]
    autoencoder: str | None = None
    data: str | None = None
    resolution: int | None = None
    unavailable: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures of each row, followed by those of its crops."""
        shown: dict[str, dict[str, float]] = {}
        for name, row in self.rows.items():
            shown[name] = {"latent positions, relative": row.positions} | row.figures
            for crop, figures in row.crops.items():
                shown[name] |= {f"{crop}: {metric}": value for metric, value in figures.items()}
        return shown


@torch.no_grad()
def compare_reconstructions(
    vae: AutoencoderDA,
    batches: Iterable[Tensor],
    *,
    beside: Mapping[str, AutoencoderDA] | None = None,
    crops: dict[str, Iterable[Tensor]] | None = None,
    networks: list[FeatureNetwork] | None = None,
    perceptual: Mapping[str, Perceptual] | None = None,
) -> ReconstructionReport:
    """Reconstruct images in every way and measure each.

    The squares of fine texture are found in the images (`davae.evaluation.reconstruction.crops`) and cut out of their
    reconstructions; all other crops are images of their own, without rows of other details.

    Args:
        vae: in any mode; used in evaluation mode, with the mean of its posterior.
        batches: images ``[B, 3, H, W]`` in [-1, 1], all of one size.
        beside: other autoencoders by the name of their row, such as a joint decoder alone.
        crops: name to images ``[1, 3, H, W]`` of any sizes, reported separately.
        networks: for Fréchet and kernel distances.
        perceptual: further distances of each pair by name, such as LPIPS.

    Raises:
        DavaeError: no image, sizes that do not fit the autoencoder, or a name in ``beside`` that a row has already.
    """
    networks, perceptual, beside = networks or [], perceptual or {}, beside or {}
    training = {model: model.training for model in (vae, *beside.values())}
    for model in training:
        model.eval()
    rows = _rows(vae, beside)
    real = ImageSet(networks)
    made = {name: ImageSet(networks) for name in rows}
    means = {name: PairMeans(perceptual) for name in rows}
    textures = {name: PairMeans(perceptual) for name in rows}
    for images, reconstructions in _reconstructions(vae, batches, beside):
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
            for name, ours in all_reconstructions(vae, images, beside).items():
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
    )


def _gains(made: ImageSet, real: ImageSet) -> dict[str, float]:
    assert made.spectrum is not None
    assert real.spectrum is not None
    gains = made.spectrum.gains(real.spectrum)
    return {f"{SPECTRAL_GAIN}/octave{number}": gain for number, gain in enumerate(gains)}


def _rows(vae: AutoencoderDA, beside: Mapping[str, AutoencoderDA]) -> dict[str, Row]:
    """The rows without figures, in their order; those of the base only if its decoder was not dropped."""
    shares = {UPGRADED: 1.0} | {
        name: (vae.spatial_compression / other.spatial_compression) ** 2 for name, other in beside.items()
    }
    if taken := [name for name in beside if name in _MEANING | DETAIL_ROWS]:
        raise DavaeError(f"'{taken[0]}' names a row that every report has: call the other autoencoder something else")
    if vae.config.has_base_decoder:
        shares |= {BASE_UPSCALED: 1.0, BASE_NATIVE: float(vae.scale**2)}
    shares[REDUCED] = 0.0
    if vae.uses_details:
        shares |= dict.fromkeys(DETAIL_ROWS, 1.0)
    meaning = _MEANING | DETAIL_ROWS
    return {name: Row(meaning.get(name, "another autoencoder"), share) for name, share in shares.items()}


def _reconstructions(
    vae: AutoencoderDA, batches: Iterable[Tensor], beside: Mapping[str, AutoencoderDA]
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Images and their reconstructions by name; every image comes once with each row."""
    details = OtherDetails(vae)
    for images in batches:
        yield images, all_reconstructions(vae, images, beside)
        if vae.uses_details:
            yield from details.of(images)
    yield from details.rest()


@torch.no_grad()
def all_reconstructions(
    vae: AutoencoderDA, images: Tensor, beside: Mapping[str, AutoencoderDA] | None = None
) -> dict[str, Tensor]:
    """Reconstructions ``[B, 3, H, W]`` by name of their row, float32 on the CPU, but for those with other details."""
    size = images.shape[-2:]
    x = images.to(vae.device, vae.dtype)
    models = {UPGRADED: vae, **(beside or {})}
    made = {name: _reconstructed(model, x) for name, model in models.items()}
    if vae.config.has_base_decoder:
        small = vae.decode_base(vae.encode_base(x)).float().clamp(-1, 1)
        made[BASE_UPSCALED] = upscaled(small, size)
        made[BASE_NATIVE] = native_reconstruction(vae, x)
    made[REDUCED] = upscaled(vae.downsample(x), size)
    return {name: image.float().clamp(-1, 1).cpu() for name, image in made.items()}


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
    """An image ``[1, 3, H, W]`` in [-1, 1] in every way by name, with details zeroed but not shuffled or drawn.

    Raises:
        DavaeError: sides that are no multiples of the autoencoder's compression.
    """
    made = all_reconstructions(vae, image)
    if vae.uses_details:
        z = vae.encode_base(image.to(vae.device, vae.dtype))
        zeros = z.new_zeros(1, vae.layout.detail_channels, *z.shape[-2:])
        made[ZEROED] = vae.decode_structured(z, zeros).float().clamp(-1, 1).cpu()
    grid = image.shape[-2] * image.shape[-1] // vae.spatial_compression**2
    rows = _rows(vae, {})
    return {
        name: OneReconstruction(found[0], float(psnr(image, found)), round(rows[name].positions * grid))
        for name, found in made.items()
    }


def _reconstructed(vae: AutoencoderDA, images: Tensor) -> Tensor:
    return vae.decode(vae.encode(images).latent_dist.mode()).sample
