"""What the ``davae train`` verbs do, callable from a script: recipe in, run directory out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils.data import Dataset

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import fit_to_autoencoder, upgrade_pipeline
from davae.pipelines.same_base import layout_over
from davae.tiny import debug_base, load_tiny
from davae.tiny.small_pipelines import small_pipeline
from davae.training.base import train_base
from davae.training.caching import open_cache
from davae.training.diffusion import DiffusionStage
from davae.training.dry_run import dry_run as describe_run
from davae.training.images import open_part, open_training_part
from davae.training.levels import train_levels
from davae.training.loop import TrainResult, train
from davae.training.recipe import dump_recipe, load_recipe
from davae.training.settings import BaseRecipe, UpgradeRecipe


def run_autoencoder(
    recipe: str | Path, overrides: Sequence[str] = (), out: Path | None = None, *, dry_run: bool = False
) -> str:
    """Train stage 1 of a recipe; returns what to tell the person who asked.

    Raises:
        DavaeError: the recipe, the data or the base is wrong, or ``out`` holds another run.
    """
    settings = _upgrade_recipe(recipe, overrides)
    if dry_run:
        return describe_run(settings, "autoencoder")
    result = train_autoencoder(settings, out or Path("runs") / f"{_stem(recipe)}-autoencoder")
    return _told(result)


def run_diffusion(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    *,
    autoencoder: Path | None = None,
    dry_run: bool = False,
) -> str:
    """Train stage 2 of a recipe on a trained autoencoder; returns what to tell the person who asked."""
    settings = _upgrade_recipe(recipe, overrides)
    if dry_run:
        return describe_run(settings, "diffusion")
    folder = autoencoder or Path("runs") / f"{_stem(recipe)}-autoencoder" / "autoencoder"
    if not folder.is_dir():
        raise DavaeError(
            f"no trained autoencoder in {folder}: run `davae train autoencoder --recipe {recipe}` first, "
            "or name one with --autoencoder"
        )
    result = train_diffusion(settings, out or Path("runs") / f"{_stem(recipe)}-diffusion", folder)
    return _told(result)


def run_base(
    recipe: str | Path, overrides: Sequence[str] = (), out: Path | None = None, *, dry_run: bool = False
) -> str:
    """Train a base pipeline; returns what to tell the person who asked."""
    settings = load_recipe(recipe, overrides)
    if not isinstance(settings, BaseRecipe):
        raise DavaeError(f"recipe '{recipe}' upgrades a base; `davae train base` needs one of kind: base")
    if dry_run:
        return dump_recipe(settings)
    return _told(train_base(settings, out or Path("runs") / _stem(recipe)))


def train_autoencoder(recipe: UpgradeRecipe, out: Path) -> TrainResult:
    """Stage 1 into ``out/autoencoder``. Continues from the newest checkpoint in ``out``."""
    return train_levels(recipe, load_base(recipe.base), out)


def train_diffusion(recipe: UpgradeRecipe, out: Path, autoencoder: Path) -> TrainResult:
    """Stage 2 into ``out/pipeline``. Continues from the newest checkpoint in ``out``."""
    base = load_base(recipe.base, transformer_dtype=getattr(torch, recipe.diffusion.tune.frozen_dtype))
    vae = AutoencoderDA.from_pretrained(autoencoder)
    pipeline = upgrade_pipeline(base, vae)
    data = recipe.data
    if data.cache:
        train_set: Dataset[Any] = open_cache(data, vae, base, text_length=recipe.diffusion.prompts.max_length)
    else:
        train_set = open_training_part(data, vae, base)
    held_out = open_part(data, "held_out")
    torch.manual_seed(recipe.diffusion.loop.seed)
    stage = DiffusionStage(
        pipeline,
        layout_over(base.vae, vae),
        recipe.diffusion,
        train_set,
        held_out,
        cache_latents=data.cache_latents and not data.cache,
        workers=recipe.data.workers,
        before=base,
    )
    result = train(stage, out, recipe.model_dump(mode="json") | {"autoencoder_folder": str(autoencoder)})
    assert result is not None
    return result


def load_base(name: str, *, transformer_dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The base pipeline of a recipe.

    Args:
        name: ``tiny``, ``debug``, ``debug-sd3`` and kin, a folder, or a hub name.
        transformer_dtype: of the transformer alone, where it is not to be float32. Read so from the start: a large
            one would not fit twice.
    """
    if name == "tiny" or name == "debug" or name.startswith("debug-"):
        if name == "tiny":
            pipe: DiffusionPipeline = load_tiny()
        else:
            pipe = debug_base() if name == "debug" else small_pipeline(name.removeprefix("debug-"))
        if transformer_dtype is not None:
            pipe.transformer.to(transformer_dtype)
        return pipe
    options = {} if transformer_dtype is None else {"dtype": {"transformer": transformer_dtype}}
    return fit_to_autoencoder(DiffusionPipeline.from_pretrained(name, **options))


def _upgrade_recipe(recipe: str | Path, overrides: Sequence[str]) -> UpgradeRecipe:
    settings = load_recipe(recipe, overrides)
    if not isinstance(settings, UpgradeRecipe):
        raise DavaeError(
            f"recipe '{recipe}' is of kind '{settings.kind}': use `davae train {settings.kind} --recipe {recipe}`"
        )
    return settings


def _stem(recipe: str | Path) -> str:
    return Path(recipe).stem


def _told(result: TrainResult) -> str:
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    return f"{result.result}\n{figures}"
