"""What an ablation measures of generated images, and the images themselves, kept for measuring again."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from davae.evaluation import log_spectral_distance, sliced_wasserstein
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.features.resize import to_bytes
from davae.evaluation.frechet import GaussianStatistics, frechet_distance
from davae.evaluation.kernel_distance import unbiased_mmd
from davae.pipelines.saving.opening import load_pipeline
from davae.training.diffusion.validation import generate_classes
from davae.training.images import open_part
from davae.training.settings import UpgradeRecipe

_BATCH = 32  # images through the feature network at a time


class GenerationMeasures:
    """Distances of generated images to real ones.

    ``swd`` is the sliced Wasserstein distance at the finest level, ``swd_mean`` over all levels, ``spectrum_db`` the
    distance of radial power spectra; with a feature network also ``frechet`` and ``kernel``, the unbiased squared
    maximum mean discrepancy of its features times 1000, which unlike the former does not grow as images get fewer.

    Args:
        real: ``[N, 3, H, W]`` in [-1, 1].
        network: of the features, if any.
    """

    def __init__(self, real: Tensor, network: FeatureNetwork | None = None) -> None:
        self._real, self._network = real, network
        self._features = None if network is None else self._rows(network, real)

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Every distance of ``images`` ``[M, 3, H, W]`` in [-1, 1]."""
        levels = list(sliced_wasserstein(images, self._real).values())
        found = {
            "swd": levels[0],
            "swd_mean": mean(levels),
            "spectrum_db": log_spectral_distance(images, self._real),
        }
        if self._network is not None and self._features is not None:
            rows = self._rows(self._network, images)
            a, b = (GaussianStatistics().update(r).gaussian() for r in (rows, self._features))
            found["frechet"] = frechet_distance(a, b)
            found["kernel"] = 1000 * unbiased_mmd(rows.double(), self._features.double())
        return found

    @staticmethod
    def _rows(network: FeatureNetwork, images: Tensor) -> Tensor:
        return torch.cat([network(part).rows.cpu() for part in images.split(_BATCH)])


def real_images(
    recipe: UpgradeRecipe, part: Literal["train", "held_out"], count: int | None = None
) -> Tensor:
    """The first ``count`` images of a part of the data, or all, ``[N, 3, H, W]`` in [-1, 1]."""
    images = open_part(recipe.data, part)
    return torch.stack([images[i]["image"] for i in range(min(len(images), count or len(images)))])


def generated_images(recipe: UpgradeRecipe, pipeline: Path, count: int, file: Path) -> Tensor:
    """Samples of the held-out images' classes in turn, ``[count, 3, H, W]`` in [-1, 1], rounded to 8 bits.

    They are kept in ``file`` and read from there the next time.
    """
    if not file.is_file():
        pipe = load_pipeline(pipeline)
        held_out = open_part(recipe.data, "held_out")
        labels = sorted({held_out[i]["label"] for i in range(len(held_out))} - {-1})
        known = dict(pipe.labels)
        numbers = [known[held_out.classes[label]] for label in labels if held_out.classes[label] in known]
        made = generate_classes(
            pipe, numbers or [0], count, recipe.diffusion.sample, seed=recipe.diffusion.loop.seed
        )
        beside = file.with_suffix(".partial")
        save_file({"images": to_bytes(made).to(torch.uint8).contiguous()}, beside)
        beside.replace(file)
    return load_file(file)["images"].float() / 127.5 - 1
