"""``davae cache`` as functions."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from diffusers import AutoencoderKL, DiffusionPipeline

from davae.bases.open import TEXT_ENCODERS, load_base, load_recipe_base
from davae.data.cache import Format, verify_cache
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.saving.opening import load_autoencoder
from davae.recipes.data import KEPT_ONCE
from davae.recipes.read import load_recipe
from davae.recipes.settings import BaseRecipe, UpgradeRecipe
from davae.runtime.places import check_place
from davae.runtime.processes import is_first
from davae.training.cache.write import write_cache
from davae.training.data import check_images
from davae.training.diffusion.inputs import details_seed_of
from davae.training.runs.train import cache_folder, check_upgrade, trained_autoencoder, training_command


def run_cache(
    recipe: str | Path,
    overrides: Sequence[str],
    out: Path | None = None,
    autoencoder: Path | None = None,
    form: Format = "safetensors",
) -> str:
    """Cache a recipe's training images in ``out``, by default where its ``data.cache`` or ``caches/RECIPE`` is; returns
    a summary to print (empty in all processes but the first).

    The recipe is an upgrade, encoded by its trained ``autoencoder`` (by default stage 1's result), or a base recipe
    with ``start_from``.

    Raises:
        DavaeError: the recipe, the data or the autoencoder is wrong, or ``out`` holds something else.
    """
    settings = _cached_recipe(recipe, overrides)
    if isinstance(settings, BaseRecipe) and autoencoder is not None:
        raise DavaeError(f"recipe '{recipe}' keeps its pipeline's autoencoder: remove --autoencoder")
    if settings.data.repeated:
        raise DavaeError(KEPT_ONCE)
    out = out or cache_folder(settings, recipe)
    if isinstance(settings, UpgradeRecipe):
        check_upgrade(settings, "diffusion")
    else:
        check_images(settings.data)
    check_place(out, "cache")
    vae, open_base = _models(settings, recipe, autoencoder)
    stage = settings.diffusion if isinstance(settings, UpgradeRecipe) else None
    made = write_cache(
        settings.data,
        vae,
        open_base(),
        out,
        form=form,
        text_length=stage.prompts.max_length if stage else None,
        details_seed=details_seed_of(stage) if stage else None,
        reopen=open_base,
    )
    if not is_first():
        return ""
    texts = f" and {made.texts} texts" if made.texts else ""
    command = training_command(settings, recipe, overrides, autoencoder, out)
    return (
        f"{made.images} images as {made.entries} latents{texts}, {made.nbytes / 1e6:.1f} MB: {made.folder}\n"
        f"train from it with `{command}`"
    )


def run_verify(folder: Path) -> str:
    """Compare the shards of a cache with their hashes; returns a summary to print, or raises a :class:`DavaeError`."""
    return f"{verify_cache(folder)} shards as they were written: {folder}"


def default_folder(recipe: str | Path, overrides: Sequence[str] = ()) -> Path:
    """The default folder of a recipe's cache.

    Raises:
        DavaeError: the recipe is wrong, or its training cannot use a cache.
    """
    return cache_folder(_cached_recipe(recipe, overrides), recipe)


def _models(
    settings: UpgradeRecipe | BaseRecipe, recipe: str | Path, autoencoder: Path | None
) -> tuple[AutoencoderDA | AutoencoderKL, Callable[[], DiffusionPipeline]]:
    """The autoencoder that encodes, and a function that opens the base's text encoders."""
    if isinstance(settings, BaseRecipe):
        assert settings.start_from is not None
        open_base = partial(load_base, settings.start_from.pipeline)
        vae = open_base(without=("transformer", TEXT_ENCODERS)).vae
    else:
        open_base = partial(load_recipe_base, settings)
        vae = load_autoencoder(trained_autoencoder(recipe, autoencoder))
    return vae, partial(open_base, without=("vae", "transformer"))


def _cached_recipe(recipe: str | Path, overrides: Sequence[str]) -> UpgradeRecipe | BaseRecipe:
    settings = load_recipe(recipe, overrides)
    if isinstance(settings, BaseRecipe) and settings.start_from is not None:
        return settings
    if not isinstance(settings, UpgradeRecipe):
        raise DavaeError(f"recipe '{recipe}' trains an autoencoder first, from images, and cannot use a cache")
    return settings
