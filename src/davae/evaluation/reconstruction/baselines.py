"""An autoencoder's reconstructions compared with baselines."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.metrics.image_set import ImageSet, compare_sets
from davae.evaluation.metrics.psnr_ssim import PairMeans, Perceptual
from davae.evaluation.reconstruction.crops import FINE_TEXTURE, fine_texture
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
    crops: dict[str, Iterable[Tensor]] | None = None,
    networks: list[FeatureNetwork] | None = None,
    perceptual: Mapping[str, Perceptual] | None = None,
) -> ReconstructionReport:
    """Reconstruct images in every way and measure each.

    The squares of fine texture are found in the images (`davae.evaluation.reconstruction.crops`) and cut out of their
    reconstructions; all other crops are images of their own.

    Args:
        vae: in any mode; used in evaluation mode, with the mean of its posterior.
        batches: images ``[B, 3, H, W]`` in [-1, 1], all of one size.
        crops: name to images ``[1, 3, H, W]`` of any sizes, reported separately.
        networks: for Fréchet and kernel distances.
        perceptual: further distances of each pair by name, such as LPIPS.

    Raises:
        DavaeError: no image, or sizes that do not fit the autoencoder.
    """
    networks, perceptual = networks or [], perceptual or {}
    was_training = vae.training
    vae.eval()
    names = list(reconstruct_all_ways(vae, None))
    shares = {UPGRADED: 1.0, BASE_UPSCALED: 1.0, BASE_NATIVE: float(vae.scale**2), REDUCED: 0.0}
    rows = {name: Row(_MEANING[name], shares[name]) for name in names}
    real = ImageSet(networks)
    made = {name: ImageSet(networks) for name in names}
    means = {name: PairMeans(perceptual) for name in names}
    textures = {name: PairMeans(perceptual) for name in names}
    for images in batches:
        real.update(images)
        cut = fine_texture(images)
        for name, ours in reconstruct_all_ways(vae, images).items():
            made[name].update(ours)
            means[name].update(images, ours)
            textures[name].update(cut(images), cut(ours))
    if real.count == 0:
        raise DavaeError("there is no image to reconstruct")
    for name, row in rows.items():
        row.figures |= means[name].figures()
        row.crops[FINE_TEXTURE] = textures[name].figures()
        if real.count > 1:
            distances = compare_sets(made[name], real)
            row.figures |= {k: v for k, v in distances.figures.items() if not k.startswith("inception_score")}
            row.unavailable |= distances.unavailable
    counts = {FINE_TEXTURE: real.count}
    for crop, images_of in (crops or {}).items():
        apart = {name: PairMeans(perceptual) for name in names}
        for images in images_of:
            for name, ours in reconstruct_all_ways(vae, images).items():
                apart[name].update(images, ours)
        counts[crop] = apart[UPGRADED].count
        if not counts[crop]:
            raise DavaeError(f"there is no image among the crops '{crop}'")
        for name, row in rows.items():
            row.crops[crop] = apart[name].figures()
    vae.train(was_training)
    return ReconstructionReport(
        images=real.count,
        crops=counts,
        scale=vae.scale,
        rows=rows,
        networks=[network.describe() for network in networks],
        perceptual={name: distance.describe() for name, distance in perceptual.items()},
        reference=real.hashes(),
    )


def reconstruct_all_ways(vae: AutoencoderDA, images: Tensor | None) -> dict[str, Tensor]:
    """Reconstructions ``[B, 3, H, W]`` by name, float32 on the CPU; with None the names alone.

    An autoencoder whose base decoder was dropped has the rows without it.
    """
    names = [UPGRADED, BASE_UPSCALED, BASE_NATIVE, REDUCED]
    if not vae.config.has_base_decoder:
        names = [UPGRADED, REDUCED]
    if images is None:
        return dict.fromkeys(names, torch.empty(0))
    size = images.shape[-2:]
    x = images.to(vae.device, vae.dtype)
    made = {UPGRADED: vae.decode(vae.encode(x).latent_dist.mode()).sample}
    if BASE_UPSCALED in names:
        small = vae.decode_base(vae.encode_base(x)).float().clamp(-1, 1)
        made[BASE_UPSCALED] = upscaled(small, size)
        made[BASE_NATIVE] = native_reconstruction(vae, x)
    made[REDUCED] = upscaled(vae.downsample(x), size)
    return {name: image.float().clamp(-1, 1).cpu() for name, image in made.items()}
