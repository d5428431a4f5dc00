"""Launch configurations that come with davae: accelerate's for one or several GPUs and machines, a Slurm script."""

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from davae.runtime.atomic_files import make_folder
from davae.runtime.places import claim


def write_configs(out: str | Path) -> list[Path]:
    """Copy ``accelerate/*.yaml`` and ``slurm/train.sbatch`` to a folder, to be used there and changed.

    Args:
        out: a new or empty folder.

    Returns:
        The files, sorted.

    Raises:
        DavaeError: the folder holds files, or cannot be written.
    """
    found = sorted(_files())
    with claim(out, "result") as folder:
        for name in found:
            file = make_folder((folder / name).parent) / Path(name).name
            file.write_bytes(resources.files(__name__).joinpath(name).read_bytes())
    return [Path(out) / name for name in found]


def _files() -> list[str]:
    """Names relative to this package, with forward slashes."""
    folders: list[Traversable] = [entry for entry in resources.files(__name__).iterdir() if entry.is_dir()]
    inside = [(folder.name, file.name) for folder in folders for file in folder.iterdir()]
    return [f"{folder}/{name}" for folder, name in inside if name.endswith((".yaml", ".sbatch"))]
