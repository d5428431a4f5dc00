"""What the ``davae train`` verbs do, callable from a script: recipe in, run directory out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.tiny import debug_base, load_tiny
from davae.training.autoencoder import AutoencoderStage
from davae.training.base import train_base
from davae.training.diffusion import DiffusionStage
from davae.training.images import open_part
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
        return dump_recipe(settings)
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
        return dump_recipe(settings)
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
    base = load_base(recipe.base)
    loop = recipe.autoencoder.loop
    torch.manual_seed(loop.seed)
    autoencoder = AutoencoderDA.from_base(base.vae, **recipe.autoencoder.model.model_dump())
    train_set, held_out = open_part(recipe.data, "train"), open_part(recipe.data, "held_out")
    stage = AutoencoderStage(
        autoencoder, recipe.autoencoder, train_set, held_out, workers=recipe.data.workers
    )
    result = train(stage, out, recipe.model_dump(mode="json"))
    assert result is not None
    return result


def train_diffusion(recipe: UpgradeRecipe, out: Path, autoencoder: Path) -> TrainResult:
    """Stage 2 into ``out/pipeline``. Continues from the newest checkpoint in ``out``."""
    base = load_base(recipe.base)
    vae = AutoencoderDA.from_pretrained(autoencoder)
    pipeline = upgrade_pipeline(base, vae)
    train_set, held_out = open_part(recipe.data, "train"), open_part(recipe.data, "held_out")
    torch.manual_seed(recipe.diffusion.loop.seed)
    stage = DiffusionStage(
        pipeline,
        vae.layout,
        recipe.diffusion,
        train_set,
        held_out,
        cache_latents=recipe.data.cache_latents,
        workers=recipe.data.workers,
        before=base,
    )
    result = train(stage, out, recipe.model_dump(mode="json") | {"autoencoder_folder": str(autoencoder)})
    assert result is not None
    return result


def load_base(name: str) -> DiffusionPipeline:
    """The base pipeline of a recipe: ``tiny``, ``debug``, a folder, or a name on the hub."""
    if name == "tiny":
        return load_tiny()
    if name == "debug":
        return debug_base()
    return DiffusionPipeline.from_pretrained(name)


def _upgrade_recipe(recipe: str | Path, overrides: Sequence[str]) -> UpgradeRecipe:
    settings = load_recipe(recipe, overrides)
    if not isinstance(settings, UpgradeRecipe):
        raise DavaeError(f"recipe '{recipe}' makes a base pipeline: use `davae train base --recipe {recipe}`")
    return settings


def _stem(recipe: str | Path) -> str:
    return Path(recipe).stem


def _told(result: TrainResult) -> str:
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    return f"{result.result}\n{figures}"
