"""What the verb ``davae cache`` calls, callable from a script."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from davae.data.cache import Format, verify_cache
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.training.caching import write_cache
from davae.training.processes import is_first
from davae.training.recipe import load_recipe
from davae.training.run import load_recipe_base
from davae.training.settings import UpgradeRecipe


def run_cache(
    recipe: str | Path,
    overrides: Sequence[str],
    out: Path,
    autoencoder: Path | None = None,
    form: Format = "safetensors",
    batch_size: int = 8,
) -> str:
    """Cache the training images of a recipe in ``out``; returns what to tell the person who asked (of several
    processes the first one does).

    Raises:
        DavaeError: the recipe, the data or the autoencoder is wrong, or ``out`` holds something else.
    """
    settings = load_recipe(recipe, overrides)
    if not isinstance(settings, UpgradeRecipe):
        raise DavaeError(
            f"recipe '{recipe}' makes a base pipeline, which trains from images: there is no cache"
        )
    folder = autoencoder or Path("runs") / f"{Path(recipe).stem}-autoencoder" / "autoencoder"
    if not folder.is_dir():
        raise DavaeError(
            f"no trained autoencoder in {folder}: run `davae train autoencoder --recipe {recipe}` first, "
            "or name one with --autoencoder"
        )
    vae = AutoencoderDA.from_pretrained(folder)
    made = write_cache(
        settings.data,
        vae,
        load_recipe_base(settings),
        out,
        form=form,
        batch_size=batch_size,
        text_length=settings.diffusion.prompts.max_length,
    )
    if not is_first():
        return ""
    texts = f" and {made.texts} texts" if made.texts else ""
    return (
        f"{made.images} images as {made.entries} latents{texts}, {made.nbytes / 1e6:.1f} MB: {made.folder}\n"
        f"train from it with `davae train diffusion --recipe {recipe} data.cache={made.folder}` "
        "and the same data settings"
    )


def run_verify(folder: Path) -> str:
    """Compare the shards of a cache with their hashes; returns what to tell the person who asked."""
    return f"{verify_cache(folder)} shards as they were written: {folder}"
