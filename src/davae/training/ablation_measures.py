"""What an ablation measures of generated images, and the images themselves, kept for measuring again."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from davae.pipelines.saving.opening import load_pipeline
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.atomic_files import atomic_tensors
from davae.runtime.pictures import to_bytes
from davae.training.diffusion.validation import generate_classes
from davae.training.images import open_part


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
        atomic_tensors(file, {"images": to_bytes(made).to(torch.uint8)})
    return load_file(file)["images"].float() / 127.5 - 1
