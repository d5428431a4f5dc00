"""Figures of parts of a set: the ten categories of MJHQ-30K, the tasks of GenEval, or whatever a prompt file names."""

from __future__ import annotations

from davae.errors import DavaeError
from davae.evaluation.frechet import Gaussian
from davae.evaluation.image_set import Distances, ImageSet, feature_distances


def compare_categories(
    found: ImageSet, reference: ImageSet | Gaussian, *, seed: int = 2020
) -> dict[str, Distances]:
    """Distances of features of each category to the reference images of the same name.

    Args:
        found: generated images, whose ``groups`` are their categories.
        reference: real images, whose ``groups`` are their classes (the folders they lie in), with the same networks.
        seed: of subsets.

    Returns:
        By category, in the order in which they first appear; empty where no image has one. A category is smaller
        than the whole set, so its Fréchet distance is larger: compare it among models, not with the whole.
    """
    result: dict[str, Distances] = {}
    for category in categories_of(found):
        result[category] = told = Distances()
        for name, features in found.features.items():
            if isinstance(reference, Gaussian):
                told.unavailable[f"fid/{name}"] = "the reference is a file of statistics: images are needed"
                continue
            there = reference.numbers_of(category)
            if not there:
                told.unavailable[f"fid/{name}"] = (
                    f"the reference has no class '{category}': its images must lie in folders named as the categories"
                )
                continue
            try:
                ours = features.part(found.numbers_of(category))
                theirs = reference.features[name].part(there)
                feature_distances(told, name, ours, theirs, seed)
            except DavaeError as error:
                told.unavailable[f"fid/{name}"] = str(error)
    return result


def categories_of(images: ImageSet) -> list[str]:
    """Names in the order of their first image; images without one do not count."""
    return [name for name in dict.fromkeys(images.groups) if name]
