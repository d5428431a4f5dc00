"""Comparison of several models' images with one reference, with all settings needed to reproduce it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork, TextImageNetwork
from davae.evaluation.generation.prompts import PromptSet
from davae.evaluation.images import spread_batches
from davae.evaluation.metrics.clip_score import ClipScore
from davae.evaluation.metrics.fid import Gaussian, load_statistics, save_statistics
from davae.evaluation.metrics.image_set import PATCH_IMAGES, Distances, ImageSet, compare_sets, feature_distances
from davae.evaluation.metrics.names import CLIP_SCORE
from davae.runtime.atomic_files import file_hash

Batches = Callable[[], Iterable[Tensor]]
"""Returns a new iterator at every call: images ``[B, 3, H, W]`` in [-1, 1], in the order of their numbers."""


@dataclass(frozen=True)
class Reference:
    """The reference of a comparison: real images, or only the moments of their features.

    Attributes:
        name: as given.
        moments: from a file of statistics.
        limit: maximum number of images, spaced evenly over the whole set; ``None`` for all.
    """

    name: str
    moments: Gaussian | None = None
    limit: int | None = None

    def gather(
        self, networks: list[FeatureNetwork], height: int, width: int, *, spatial: bool = True
    ) -> ImageSet | Gaussian:
        """The moments, or the images, cropped to ``height`` x ``width``, as an :class:`ImageSet`.

        Raises:
            DavaeError: there are no images.
        """
        if self.moments is not None:
            return self.moments
        found = ImageSet(networks, spatial=spatial)
        for images, classes in self.batches(height, width):
            found.update(images, classes)
        return found

    def captions(self) -> list[str]:
        """The distinct captions of the images, in order; none of statistics."""
        if self.moments is not None:
            return []
        return list(dict.fromkeys(filter(None, open_dataset(self.name, resolution=8, quiet=True).captions())))

    def batches(self, height: int, width: int, *, size: int = 32) -> Iterator[tuple[Tensor, list[str]]]:
        """Images ``[B, 3, H, W]`` in [-1, 1], resized and centre-cropped as in ADM, with the names of their classes."""
        buckets = None if height == width else [(width, height)]
        dataset = open_dataset(self.name, resolution=min(height, width), buckets=buckets)
        for items in spread_batches(dataset, self.limit or len(dataset), size):
            classes = ["" if item["label"] < 0 else dataset.classes[item["label"]] for item in items]
            yield torch.stack([item["image"] for item in items]), classes

    def describe(self, gathered: ImageSet | Gaussian) -> dict[str, Any]:
        """For the JSON."""
        if isinstance(gathered, Gaussian):
            return {
                "statistics": self.name,
                "sha256": file_hash(self.name),
                "features": len(gathered.mean),
                "images": gathered.count,
            }
        return {
            "data": self.name,
            "images": gathered.count,
            "preprocessing": "short side halved by boxes while twice too large, then bicubic; centre crop; 8 bits",
        } | gathered.hashes()


def open_reference(name: str, *, limit: int | None = None) -> Reference:
    """A reference by name: an ``.npz`` of statistics, or images as in a recipe's ``data.path``.

    Raises:
        DavaeError: the statistics cannot be read, or there are no images.
    """
    if Path(name).suffix == ".npz":
        return Reference(name, load_statistics(name))
    open_dataset(name, resolution=8, quiet=True)  # tried before images are generated, and opened at their size later
    return Reference(name, None, limit)


@dataclass(frozen=True)
class GenerationReport:
    """The result of :func:`compare_generation`.

    Attributes:
        count: images of each model.
        reference: its description, with hash or preprocessing.
        rows: figures by model.
        categories: number of each model's images in each category, by name.
        networks: preprocessing and weights of each feature network.
        settings: of the metrics.
        runs: folder and settings of the images by model, if davae generated them.
        meanings: what each model is.
        seconds: per image by model, as far as they were measured: from noise to the image at full resolution.
        upscalers: what each upscaler is, by name.
    """

    count: int
    reference: dict[str, Any]
    rows: dict[str, Distances]
    categories: dict[str, int]
    networks: list[dict[str, Any]]
    settings: dict[str, Any]
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    meanings: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    upscalers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures of each model, followed by Fréchet distance and CLIP score of its categories."""
        shown: dict[str, dict[str, float]] = {}
        for model, row in self.rows.items():
            shown[model] = {"seconds per image": self.seconds[model]} if model in self.seconds else {}
            shown[model] |= row.figures
            for category, part in row.categories.items():
                shown[model] |= {
                    f"{category}: {metric}": value
                    for metric, value in part.figures.items()
                    if metric.startswith("fid/") or metric == CLIP_SCORE
                }
        return shown

    def missing(self) -> dict[str, str]:
        """Reasons for the metrics that are missing for some model."""
        reasons: dict[str, str] = {}
        for row in self.rows.values():
            reasons |= row.unavailable
            for category, part in row.categories.items():
                reasons |= {f"{category}: {metric}": reason for metric, reason in part.unavailable.items()}
        return reasons


def compare_generation(
    models: Mapping[str, Batches],
    reference: Reference,
    *,
    networks: list[FeatureNetwork] | None = None,
    clip: TextImageNetwork | None = None,
    prompts: PromptSet | None = None,
    unavailable: Mapping[str, str] | None = None,
    save_statistics_to: Path | None = None,
) -> GenerationReport:
    """Measure the images of every model.

    Args:
        models: images by name, all of one size and number.
        reference: to compare with.
        networks: for the distances of features.
        clip: for the CLIP score, with ``prompts``.
        prompts: subjects of the images.
        unavailable: reasons for requested metrics that are unavailable, added to every row.
        save_statistics_to: ``.npz`` for the moments of the reference's features, with one network only.

    Raises:
        DavaeError: no model, no images, images of different sizes, or moments that cannot be saved.
    """
    networks = networks or []
    gathered: ImageSet | Gaussian | None = None
    rows: dict[str, Distances] = {}
    categories: dict[str, int] = {}
    count = 0
    for name, batches in models.items():
        found, scores = ImageSet(networks), defaultdict[str, ClipScore](ClipScore)
        for images in batches():
            numbers = range(found.count, found.count + len(images))
            groups = [""] * len(images) if prompts is None else [prompts.category(i) for i in numbers]
            if clip is not None and prompts is not None:
                pairs = clip(images).rows, clip.texts([prompts.subject(i) for i in numbers])
                _score_by_category(scores, groups, *pairs)
            if gathered is None:
                gathered = reference.gather(networks, *images.shape[-2:])
            found.update(images, groups)
        if gathered is None or found.count == 0:
            raise DavaeError(f"there are no images of '{name}'")
        count = found.count
        categories = {category: len(found.numbers_of(category)) for category in categories_of(found)}
        rows[name] = compare_sets(found, gathered)
        rows[name].categories = compare_categories(found, gathered)
        for category, score in scores.items():
            part = rows[name].categories[category] if category else rows[name]
            part.figures[CLIP_SCORE] = score.score()
        rows[name].unavailable |= dict(unavailable or {})
    if gathered is None:
        raise DavaeError("there is no model to measure")
    about = reference.describe(gathered)
    if save_statistics_to is not None:
        about["saved"] = _save_moments(gathered, save_statistics_to)
    return GenerationReport(
        count=count,
        reference=about,
        rows=rows,
        categories=categories,
        networks=[network.describe() for network in networks]
        + ([] if clip is None else [clip.describe() | {"for": CLIP_SCORE}]),
        settings={
            "kid": "polynomial kernel (x.y / F + 1)^3, unbiased, 100 subsets of at most 1000, seed 2020",
            "precision_recall": "3 neighbours",
            "inception_score": "10 parts of the shuffled images, of at least 10 images each, seed 2020",
            "swd": f"patches 7 x 7, 128 an image and level, first {PATCH_IMAGES} images, pooled moments, seed 0",
        },
    )


def _score_by_category(
    scores: defaultdict[str, ClipScore], groups: Sequence[str], images: Tensor, texts: Tensor
) -> None:
    """Add pairs of embeddings ``[B, F]`` to the overall score (with an empty name) and to those of their categories."""
    scores[""].update(images, texts)
    for category in {group for group in groups if group}:
        chosen = [i for i, group in enumerate(groups) if group == category]
        scores[category].update(images[chosen], texts[chosen])


def _save_moments(gathered: ImageSet | Gaussian, file: Path) -> dict[str, str]:
    if isinstance(gathered, Gaussian) or len(gathered.features) != 1:
        raise DavaeError("saved statistics are of images by one feature network: give images and one --features")
    ((network, features),) = gathered.features.items()
    return {"file": str(file), "network": network, "sha256": save_statistics(features.gaussian(), file)}


def compare_categories(found: ImageSet, reference: ImageSet | Gaussian, *, seed: int = 2020) -> dict[str, Distances]:
    """Distances of features of each category to the reference images of the same name.

    Args:
        found: generated images, whose ``groups`` are their categories.
        reference: real images, whose ``groups`` are their classes (the folders they lie in), with the same networks.
        seed: of subsets.

    Returns:
        By category, in the order in which they first appear; empty if no image has one. A category is smaller
        than the whole set, so its Fréchet distance is larger: compare it among models, not with the whole.
    """
    result: dict[str, Distances] = {}
    for category in categories_of(found):
        result[category] = distances = Distances()
        for name, features in found.features.items():
            if isinstance(reference, Gaussian):
                distances.unavailable[f"fid/{name}"] = "the reference is a file of statistics: images are needed"
                continue
            there = reference.numbers_of(category)
            if not there:
                distances.unavailable[f"fid/{name}"] = (
                    f"the reference has no class '{category}': its images must lie in folders named as the categories"
                )
                continue
            try:
                ours = features.part(found.numbers_of(category))
                theirs = reference.features[name].part(there)
                feature_distances(distances, name, ours, theirs, seed)
            except DavaeError as error:
                distances.unavailable[f"fid/{name}"] = str(error)
    return result


def categories_of(images: ImageSet) -> list[str]:
    """Names of categories in the order of their first image."""
    return [name for name in dict.fromkeys(images.groups) if name]
