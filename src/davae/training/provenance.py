"""Where a run's base and its images came from: what its environment.json says, and what a recipe can pin."""

from __future__ import annotations

import re
from typing import Any

from davae.data import ItemDataset
from davae.recipes.data import DataSettings
from davae.recipes.settings import UpgradeRecipe

_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")


def base_facts(recipe: UpgradeRecipe, pipe: Any) -> dict[str, Any]:
    """``{"base": {"name", "revision", "commit"}}``; ``commit`` is none where it is not known (folders, embedded)."""
    return {
        "base": {"name": recipe.base, "revision": recipe.base_revision, "commit": commit_of(pipe)},
    }


def data_facts(data: DataSettings, images: ItemDataset) -> dict[str, Any]:
    """``{"data": {"name", "revision", "commit"}}``; ``commit`` is none where images are not from the hub.

    Args:
        data: the recipe's section.
        images: a data set that was opened by it, or one around such a data set.
    """
    return {"data": {"name": data.path, "revision": data.revision, "commit": images.commit}}


def commit_of(pipe: Any) -> str | None:
    """The commit on the hub that a pipeline was loaded from, 40 hexadecimal digits.

    Parts remember the folder they were read from, and the hub's cache keeps each commit in a folder of its name. None
    where no part lies in that cache.
    """
    for part in pipe.components.values():
        # diffusers' parts say it in their configuration, tokenizers in an attribute
        places = (getattr(getattr(part, "config", None), "_name_or_path", None), _path_of(part))
        for place in places:
            found = _SNAPSHOT.search(str(place or ""))
            if found:
                return found.group(1)
    return None


def _path_of(part: Any) -> str | None:
    return getattr(part, "name_or_path", None)
