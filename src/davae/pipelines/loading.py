"""Opening a pipeline wherever it lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from davae.errors import DavaeError
from davae.pipelines.adapters import LAYERS_FILE
from davae.pipelines.full_resolution import fit_to_autoencoder
from davae.pipelines.opening import hub_name, opening


def load_pipeline(folder_or_repo: str | Path, **options: Any) -> DiffusionPipeline:
    """Open a pipeline: of davae or of diffusers, from a folder, a finished run, or the hub.

    It is davae's own classes that are used; the code that lies in a davae pipeline's folder, for people without davae,
    is not executed. ``height`` and ``width`` mean the full resolution in every pipeline: a few (Lumina 2, PixArt,
    SANA) write sizes down and get them corrected here, which plain ``from_pretrained`` cannot do.

    Args:
        folder_or_repo: a pipeline folder, a run directory that has one, or ``user/name``.
        options: as for ``DiffusionPipeline.from_pretrained``, such as ``dtype``.

    Raises:
        DavaeError: a folder without a pipeline, files that are missing or damaged, or a name that the hub does not
            give.
    """
    place = pipeline_place(folder_or_repo)
    with opening("pipeline", place, passed=options):
        return fit_to_autoencoder(DiffusionPipeline.from_pretrained(place, **options))


def pipeline_place(folder_or_repo: str | Path) -> str:
    """The folder of a pipeline, from that folder or from a run that has one; a name on the hub as it is.

    Raises:
        DavaeError: a folder without a pipeline, or a path that is not there.
    """
    folder = Path(folder_or_repo)
    if not folder.is_dir():
        return hub_name("pipeline", str(folder_or_repo))
    if (folder / LAYERS_FILE).is_file():
        raise DavaeError(
            f"{folder} holds adapters, which need their base: davae.load_adapters(base, autoencoder, folder)"
        )
    for candidate in (folder, folder / "pipeline"):
        if (candidate / "model_index.json").is_file():
            return str(candidate)
    raise DavaeError(
        f"{folder} holds no pipeline: there is no model_index.json in it or in its folder 'pipeline'"
    )
