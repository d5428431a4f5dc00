"""Sets of images, collected batch by batch, and all distances between two sets."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork, Features
from davae.evaluation.metrics.fid import Gaussian, GaussianStatistics, frechet_distance
from davae.evaluation.metrics.inception_score import inception_score
from davae.evaluation.metrics.kid import kid
from davae.evaluation.metrics.names import SPECTRUM_DB, SWD_FINEST, SWD_MEAN
from davae.evaluation.metrics.precision_recall import precision_recall
from davae.evaluation.metrics.sliced_wasserstein import PatchSet
from davae.evaluation.metrics.spectrum import SpectrumMean
from davae.runtime.pictures import to_bytes

PATCH_IMAGES = 8192
"""Patches are cut from at most this many first images of a set, to limit memory."""

KID_SUBSET = 1000
NEIGHBOURS = 3
_STATISTICS_ONLY = "the reference is a file of statistics: images are needed"


class FeatureSet:
    """Features of a set by one network: the rows, and their moments."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._logits: list[Tensor] = []
        self._statistics = GaussianStatistics()
        self._gaussian: Gaussian | None = None

    def update(self, features: Features) -> None:
        """Add a batch."""
        self._statistics.update(features.rows)
        self._rows.append(features.rows.float().cpu())
        if features.logits is not None:
            self._logits.append(features.logits.float().cpu())

    @property
    def rows(self) -> Tensor:
        """``[N, F]``."""
        return torch.cat(self._rows)

    @property
    def logits(self) -> Tensor | None:
        """``[N, K]``; ``None`` if the network has no classes."""
        return torch.cat(self._logits) if self._logits else None

    def part(self, numbers: Sequence[int]) -> FeatureSet:
        """The features of some of the images, without logits.

        Raises:
            DavaeError: fewer than two images, which have no covariance.
        """
        if len(numbers) < 2:
            raise DavaeError(f"a distance needs at least 2 images, got {len(numbers)}")
        chosen = FeatureSet()
        chosen.update(Features(self.rows[list(numbers)]))
        return chosen

    def gaussian(self) -> Gaussian:
        """Their moments; the same object until more are added, since it caches its expensive factor."""
        if self._gaussian is None or self._gaussian.count != self._statistics.count:
            self._gaussian = self._statistics.gaussian()
        return self._gaussian


class ImageSet:
    """A set of images: features, patches, power spectrum and a hash of the pixels.

    Args:
        networks: to compute features with.
        spatial: also collect patches and the power spectrum; the images must then have one size.
        seed: of the patches.
    """

    def __init__(self, networks: Sequence[FeatureNetwork] = (), *, spatial: bool = True, seed: int = 0) -> None:
        self.networks = list(networks)
        self.features = {network.name: FeatureSet() for network in networks}
        self.patches = PatchSet(seed=seed) if spatial else None
        self.spectrum = SpectrumMean() if spatial else None
        self.groups: list[str] = []
        """Class or category of each image; empty if it has none."""
        self._pixels = hashlib.sha256()
        self.count = 0

    def update(self, images: Tensor, groups: Sequence[str] | None = None) -> ImageSet:
        """Add images ``[B, 3, H, W]`` in [-1, 1], with their classes or categories; returns itself."""
        for network in self.networks:
            self.features[network.name].update(network(images))
        if self.patches is not None and self.patches.count < PATCH_IMAGES:
            self.patches.update(images[: PATCH_IMAGES - self.patches.count].cpu())
        if self.spectrum is not None:
            self.spectrum.update(images.cpu())
        self._pixels.update(to_bytes(images).to(torch.uint8).cpu().numpy().tobytes())
        self.groups += groups or [""] * len(images)
        self.count += len(images)
        return self

    def numbers_of(self, group: str) -> list[int]:
        """Numbers of the images of a class or category."""
        return [i for i, name in enumerate(self.groups) if name == group]

    def hashes(self) -> dict[str, Any]:
        """SHA-256 of the 8-bit pixels ``[N, 3, H, W]`` in their order, and of each network's moments.

        The first does not depend on where the images are stored. The last digits of moments, and so their hashes,
        depend on the machine; to share moments exactly, save them to a file.
        """
        moments = {name: features.gaussian().sha256() for name, features in self.features.items()}
        return {"pixels_sha256": self._pixels.hexdigest()} | ({"moments_sha256": moments} if moments else {})

    def extend(self, batches: Iterable[Tensor]) -> ImageSet:
        """Add every batch; returns itself."""
        for batch in batches:
            self.update(batch)
        return self


@dataclass
class Distances:
    """Figures by name, and the reasons for unavailable ones.

    Attributes:
        figures: such as ``fid/inception``, see :mod:`davae.evaluation.metrics.names`.
        unavailable: reasons by name.
        categories: the same of parts of the set, by name.
    """

    figures: dict[str, float] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    categories: dict[str, Distances] = field(default_factory=dict)


def compare_sets(found: ImageSet, reference: ImageSet | Gaussian, *, seed: int = 2020) -> Distances:
    """All distances of a set of images to a reference set, and its Inception Score.

    Args:
        found: generated or reconstructed images.
        reference: real images with the same networks, or the moments of their features alone.
        seed: of subsets and shuffles.
    """
    result = Distances()
    for name, features in found.features.items():
        known = reference if isinstance(reference, Gaussian) else reference.features[name]
        feature_distances(result, name, features, known, seed)
    if isinstance(reference, Gaussian):
        result.unavailable |= dict.fromkeys((SWD_FINEST, SWD_MEAN, SPECTRUM_DB), _STATISTICS_ONLY)
    else:
        result.figures |= spatial_distances(found, reference)
    return result


def spatial_distances(found: ImageSet, reference: ImageSet) -> dict[str, float]:
    """Sliced Wasserstein and spectral distance of two sets; empty if one was collected without patches and spectrum."""
    if found.patches is None or reference.patches is None:
        return {}
    assert found.spectrum is not None
    assert reference.spectrum is not None
    return swd_figures(found.patches.distance(reference.patches)) | {
        SPECTRUM_DB: found.spectrum.distance(reference.spectrum)
    }


def swd_figures(levels: Mapping[int, float]) -> dict[str, float]:
    """Distances of pyramid levels by name: the mean, ``swd/finest`` for level 0, ``swd/levelN`` for coarser ones."""
    named = {f"swd/level{level}" if level else SWD_FINEST: value for level, value in levels.items()}
    return {SWD_MEAN: sum(levels.values()) / len(levels)} | named


def feature_distances(
    result: Distances, name: str, features: FeatureSet, reference: FeatureSet | Gaussian, seed: int
) -> None:
    """Add the distances of one network's features to ``result``, as ``metric/name``."""
    rows, logits = features.rows, features.logits
    moments = reference if isinstance(reference, Gaussian) else reference.gaussian()
    try:
        result.figures[f"fid/{name}"] = frechet_distance(features.gaussian(), moments)
    except DavaeError as error:
        result.unavailable[f"fid/{name}"] = str(error)
    if isinstance(reference, Gaussian):
        result.unavailable |= {f"{m}/{name}": _STATISTICS_ONLY for m in ("kid", "precision", "recall")}
    else:
        others = reference.rows
        size = min(KID_SUBSET, len(rows), len(others))
        found = kid(rows, others, subset_size=size, seed=seed)
        result.figures |= {f"kid/{name}": found.mean, f"kid_std/{name}": found.std}
        if min(len(rows), len(others)) > NEIGHBOURS:
            both = precision_recall(others, rows, neighbours=NEIGHBOURS)
            result.figures |= {f"precision/{name}": both.precision, f"recall/{name}": both.recall}
        else:
            reason = f"needs more than {NEIGHBOURS} images"
            result.unavailable |= {f"{m}/{name}": reason for m in ("precision", "recall")}
    if logits is not None:
        # Ten parts as published; fewer if a part would have less than ten images, too few for a score.
        score = inception_score(logits, splits=min(10, max(1, len(logits) // 10)), seed=seed)
        result.figures |= {f"inception_score/{name}": score.mean, f"inception_score_std/{name}": score.std}
