"""Choosing the images of an evaluation."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from davae.data import Item, ItemDataset, open_dataset
from davae.errors import DavaeError
from davae.recipes.data import MoreImages
from davae.recipes.yaml_text import plain_yaml
from davae.runtime.text_files import read_text


def spread_batches(dataset: ItemDataset, count: int, size: int) -> Iterator[list[Item]]:
    """``count`` items in batches of ``size``, spaced evenly over the data set; all items if it has no more."""
    count = min(count, len(dataset))
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        yield [dataset[i * len(dataset) // count] for i in numbers]


def held_out_images(autoencoder: Path, resolution: int) -> ItemDataset:
    """The images that an autoencoder's run held out, whatever the resolution they are measured at.

    Raises:
        DavaeError: the folder is not in a run, or the run held out none.
    """
    settings = _run_data(autoencoder)
    if settings is not None and settings["hold_out"]:
        hold_out = settings["hold_out"]
        found = open_dataset(
            settings["path"],
            resolution=resolution,
            split=settings["split"],
            hold_out=hold_out,
            tenth_of_few=True,
            part="held_out",
            min_size=int(settings["resolution"]) // 4,  # as in training: smaller images count in neither part
            revision=settings.get("revision"),
            more=[MoreImages.model_validate(images) for images in _more_at(settings)],
        )
        if len(found):
            return found
    raise DavaeError(f"{autoencoder} is in no run that held images out: name images with --data")


def _more_at(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The further sets of a run that held images out: those at its own resolution."""
    for images in settings.get("more") or ():
        if images.get("resolution") in (None, settings["resolution"]):
            yield {**images, "resolution": None}


def trained_resolution(autoencoder: Path) -> int:
    """Side in pixels of the images that an autoencoder was trained on, from its run.

    Raises:
        DavaeError: the folder is not in a run.
    """
    settings = _run_data(autoencoder)
    if settings is None:
        raise DavaeError(f"{autoencoder} is not in a run, so its resolution is not known: give --resolution")
    return int(settings["resolution"])


def _run_data(autoencoder: Path) -> dict[str, Any] | None:
    """The section ``data`` of the recipe of a folder's run; ``None`` if the folder is not in a run."""
    recipe = autoencoder.resolve().parent / "config.yaml"
    if not recipe.is_file():
        return None
    try:
        found = plain_yaml(read_text(recipe))
    except (ValueError, DavaeError):
        return None  # another program's file of that name
    section = found.get("data") if isinstance(found, dict) else None
    return (
        section if isinstance(section, dict) and {"path", "resolution", "split", "hold_out"} <= section.keys() else None
    )
