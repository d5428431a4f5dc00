"""Which commands write a recipe's cache and train from it, and where the cache lies: one answer for both."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from davae.errors import DavaeError
from davae.recipes.settings import BaseRecipe, UpgradeRecipe


def cache_folder(settings: UpgradeRecipe | BaseRecipe, recipe: str | Path) -> Path:
    """Where the cache of a recipe lies: where its ``data.cache`` says, else ``caches/RECIPE``."""
    return Path(settings.data.cache or Path("caches") / Path(recipe).stem)


def training_command(
    settings: UpgradeRecipe | BaseRecipe,
    recipe: str | Path,
    overrides: Sequence[str],
    autoencoder: Path | None,
    folder: Path,
) -> str:
    """The command that trains from the cache in ``folder``.

    Args:
        settings: the resolved recipe.
        recipe, overrides, autoencoder: as they were given to ``davae cache``.
        folder: of the cache.
    """
    named = settings.data.cache is not None and Path(settings.data.cache) == folder
    more = [] if named else [f"data.cache={folder}"]
    verb = ["train", "diffusion" if isinstance(settings, UpgradeRecipe) else "base"]
    return _command(verb, recipe, [*overrides, *more], autoencoder)


def check_cache_is_there(
    settings: UpgradeRecipe | BaseRecipe,
    recipe: str | Path,
    overrides: Sequence[str] = (),
    autoencoder: Path | None = None,
) -> None:
    """Refuse to train from a cache that nobody has written, before a base is loaded for it.

    Args:
        settings: the resolved recipe.
        recipe, overrides, autoencoder: as they were given to ``davae train``.

    Raises:
        DavaeError: ``data.cache`` names a folder without a cache; the message has the command that writes it.
    """
    folder = settings.data.cache
    if folder is None or (Path(folder) / "fingerprint.json").is_file():
        return
    raise DavaeError(
        f"there is no cache of latents in {folder}, from which the recipe '{recipe}' trains (data.cache): run "
        f"`{_command(['cache'], recipe, overrides, autoencoder)}` first, or train from the images themselves with "
        "data.cache=null"
    )


def _command(
    verb: Sequence[str], recipe: str | Path, overrides: Sequence[str], autoencoder: Path | None
) -> str:
    options = [] if autoencoder is None else ["--autoencoder", str(autoencoder)]
    return shlex.join(["davae", *verb, "--recipe", str(recipe), *options, *overrides])
