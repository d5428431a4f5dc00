"""Files that come with davae: weights by name, and what is copied out of the installed package for use elsewhere."""

from collections.abc import Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from davae.runtime.atomic_files import make_folder
from davae.runtime.places import claim

TINY, TINY_UPGRADED = "tiny", "tiny-upgraded"
"""The embedded base and its upgrade, class-conditional pipelines, stored in float16 and opened in float32; the model
cards beside them say how they were made."""


def shipped(name: str | Path) -> Path | None:
    """The folder of a pipeline that comes with davae; None for any other name, or where its files are missing."""
    folder = Path(__file__).parents[1] / "shipped" / str(name)
    return folder if str(name) in (TINY, TINY_UPGRADED) and (folder / "model_index.json").is_file() else None


def write_package_files(place: str, out: str | Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Copy the files of a folder of the package, folders within it included, to another folder.

    Args:
        place: relative to davae's package, with forward slashes.
        out: a new or empty folder.
        suffixes: of the files that are meant.

    Returns:
        The files, sorted.

    Raises:
        DavaeError: the folder holds files, or cannot be written.
    """
    source = resources.files("davae").joinpath(place)
    found = sorted(name for name in _names(source) if name.endswith(suffixes))
    with claim(out, "result") as folder:
        for name in found:
            file = make_folder((folder / name).parent) / Path(name).name
            file.write_bytes(source.joinpath(name).read_bytes())
    return [Path(out) / name for name in found]


def _names(place: Traversable, inside: str = "") -> Iterator[str]:
    """Relative to the folder, with forward slashes."""
    for entry in place.iterdir():
        if entry.is_dir():
            yield from _names(entry, f"{inside}{entry.name}/")
        else:
            yield f"{inside}{entry.name}"
