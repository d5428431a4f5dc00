"""What the ``davae train`` verbs do, callable from a script: recipe in, run directory out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from davae.errors import DavaeError
from davae.pipelines import fit_to_autoencoder
from davae.pipelines.saving.opening import opening, pipeline_place
from davae.recipes.data_path import check_data_path
from davae.recipes.presets import find_preset
from davae.recipes.read import load_recipe
from davae.recipes.settings import BaseRecipe, UpgradeRecipe
from davae.runtime.devices import saved_dtype
from davae.tiny import debug_base, load_tiny
from davae.training.base import train_base
from davae.training.cache_commands import check_cache_is_there
from davae.training.diffusion.train import train_transformer
from davae.training.dry_run import dry_run as describe_run
from davae.training.dry_run_base import dry_run_base as describe_base_run
from davae.training.levels import train_levels
from davae.training.loop import TrainResult


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
    folder = trained_autoencoder(recipe, autoencoder)
    check_cache_is_there(settings, recipe, overrides, autoencoder)
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
        return describe_base_run(settings)
    check_cache_is_there(settings, recipe, overrides)
    check_data_path(settings.data.path, settings.data.revision)
    start = settings.start_from
    base = None if start is None else load_base(start.pipeline)
    return _told(train_base(settings, out or Path("runs") / _stem(recipe), base))


def train_autoencoder(recipe: UpgradeRecipe, out: Path) -> TrainResult:
    """Stage 1 into ``out/autoencoder``. Continues from the newest checkpoint in ``out``."""
    check_data_path(recipe.data.path, recipe.data.revision)  # before a base is loaded
    return train_levels(recipe, load_recipe_base(recipe), out)


def train_diffusion(recipe: UpgradeRecipe, out: Path, autoencoder: Path) -> TrainResult:
    """Stage 2 into ``out/pipeline``. Continues from the newest checkpoint in ``out``."""
    check_data_path(recipe.data.path, recipe.data.revision)
    base = load_recipe_base(recipe, transformer_dtype=getattr(torch, recipe.diffusion.tune.frozen_dtype))
    return train_transformer(recipe, base, out, autoencoder)


def load_recipe_base(
    recipe: UpgradeRecipe, *, transformer_dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """The base that a recipe names, at the revision that it pins."""
    return load_base(
        recipe.base,
        revision=recipe.base_revision,
        remote_code=recipe.base_remote_code,
        transformer_dtype=transformer_dtype,
    )


def load_base(
    name: str,
    *,
    revision: str | None = None,
    remote_code: bool | None = None,
    transformer_dtype: torch.dtype | None = None,
    dtype: torch.dtype | Literal["saved"] | None = None,
) -> DiffusionPipeline:
    """The base pipeline of a recipe, or another one that is made in code, in a folder, a finished run's, or on the hub.

    Args:
        name: ``tiny``, ``debug``, ``debug-sd3`` and kin, a folder, or a hub name.
        revision: of a hub name: branch, tag or commit; none takes the newest.
        remote_code: whether Python files beside the weights may be executed, as a recipe says; None is no, where no
            recipe can say so.
        transformer_dtype: of the transformer alone, where it is not to be float32. Read so from the start: a large
            one would not fit twice.
        dtype: of all parts; ``saved`` is that in which the transformer was saved. None is float32, with text encoders
            as they were saved.

    Raises:
        DavaeError: there is none of that name, or files of it are missing or damaged; the base brings code and
            ``remote_code`` is off, its weights are pickles, or a folder is to have a revision.
    """
    if name == "tiny" or name == "debug" or name.startswith("debug-"):
        if name == "tiny":
            pipe: DiffusionPipeline = load_tiny()
        elif name == "debug":
            pipe = debug_base()
        else:
            from davae.tiny.small_pipelines import (
                small_pipeline,  # imports eight families: only when asked for
            )

            pipe = small_pipeline(name.removeprefix("debug-"))
        if transformer_dtype is not None:
            pipe.transformer.to(transformer_dtype)
        return pipe if dtype is None or dtype == "saved" else pipe.to(dtype)
    preset = None if Path(name).exists() else find_preset(name)
    if preset is not None and preset.pipeline == "ClassConditionalPipeline":
        raise DavaeError(
            f"'{name}' is published as checkpoint files, not as a pipeline: convert them with `davae convert vavae` "
            "and `davae convert lightningdit --vae`, and give the folder; see docs/imagenet.md"
        )
    options: dict[str, Any] = {"use_safetensors": True}
    if transformer_dtype is not None:
        options["dtype"] = {"transformer": transformer_dtype}
    if revision is not None:
        if Path(name).is_dir():
            raise DavaeError(
                f"base_revision is set, but {name} is a folder; revisions are of names on the hub"
            )
        options["revision"] = revision
    if remote_code:
        options["trust_remote_code"] = True
    place = pipeline_place(name)
    try:
        with opening("pipeline", place):
            if dtype == "saved":
                if not Path(place).is_dir():
                    place = str(DiffusionPipeline.download(place, **options))
                dtype = saved_dtype(Path(place) / "transformer")
            if dtype is not None:
                options["dtype"] = dtype
            return fit_to_autoencoder(DiffusionPipeline.from_pretrained(place, **options))
    except DavaeError as error:
        if "safetensors" not in str(error) or not _pickles(place):
            raise
        raise DavaeError(
            f"the base {name} has weights that are not safetensors but pickles, which can run code when they are read "
            f"({error}). Where you trust them, convert them once: "
            f"DiffusionPipeline.from_pretrained({name!r}).save_pretrained('FOLDER'), then base: FOLDER"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error) or remote_code:
            raise
        told = (
            "open it in Python with trust_remote_code=True"
            if remote_code is None
            else "say base_remote_code: true in the recipe"
        )
        raise DavaeError(
            f"the base {name} brings Python code of its own, which is not executed. Read that code first; where you "
            f"trust it, {told}"
        ) from error


def _pickles(place: str) -> bool:
    """Whether a folder has weights of that kind; of a name on the hub it is not known, and taken so."""
    folder = Path(place)
    return not folder.is_dir() or any(
        file.suffix in (".bin", ".pt", ".pth", ".ckpt") for file in folder.rglob("*")
    )


def _upgrade_recipe(recipe: str | Path, overrides: Sequence[str]) -> UpgradeRecipe:
    settings = load_recipe(recipe, overrides)
    if not isinstance(settings, UpgradeRecipe):
        raise DavaeError(
            f"recipe '{recipe}' is of kind '{settings.kind}': use `davae train {settings.kind} --recipe {recipe}`"
        )
    return settings


def trained_autoencoder(recipe: str | Path, given: Path | None) -> Path:
    """The folder of a recipe's trained autoencoder: the given one, else where its first stage writes it.

    Raises:
        DavaeError: there is no such folder.
    """
    folder = given or Path("runs") / f"{_stem(recipe)}-autoencoder" / "autoencoder"
    if not folder.is_dir():
        raise DavaeError(
            f"no trained autoencoder in {folder}: run `davae train autoencoder --recipe {recipe}` first, "
            "or name one with --autoencoder"
        )
    return folder


def _stem(recipe: str | Path) -> str:
    return Path(recipe).stem


def _told(result: TrainResult) -> str:
    figures = "  ".join(f"{name} {value:.4g}" for name, value in result.metrics.items())
    return f"{result.result}\n{figures}"
