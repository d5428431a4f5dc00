"""``davae inspect``: what a trained autoencoder's latent holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml
from rich.console import Console
from rich.table import Table

from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation.inspection import Inspection, inspect_autoencoder
from davae.models import AutoencoderDA
from davae.report.inspection import draw_inspection


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(_inspect)


def _inspect(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[str, typer.Option("--data", help="Images, as in a recipe (see docs/data.md).")],
    beside: Annotated[
        Path | None, typer.Option("--beside", help="A second autoencoder, such as one without alignment.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the pictures and inspection.json.")] = Path(
        "inspection"
    ),
    images: Annotated[
        int, typer.Option("--images", help="How many images, evenly from the whole set.")
    ] = 256,
    resolution: Annotated[
        int | None, typer.Option("--resolution", help="Side in pixels (default: the run's).")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="tsne or pca.")] = "tsne",
) -> None:
    """Class maps, spectra, channel statistics, and reconstruction with the details zeroed and shuffled."""
    if method not in ("tsne", "pca"):
        raise DavaeError(f"--method must be tsne or pca, not '{method}'")
    folders = {"this": autoencoder} if beside is None else {autoencoder_title(autoencoder): autoencoder}
    if beside is not None:
        title = autoencoder_title(beside)
        folders[title if title not in folders else f"{title} (beside)"] = beside
    found: dict[str, Inspection] = {}
    for title, folder in folders.items():
        if not (folder / "config.json").is_file():
            raise DavaeError(f"no autoencoder in {folder}: it has no config.json")
        vae = AutoencoderDA.from_pretrained(folder)
        side = resolution or trained_resolution(folder)
        dataset = open_dataset(data, resolution=side)
        count = min(images, len(dataset))
        items = [dataset[i * len(dataset) // count] for i in range(count)]
        labels = torch.tensor([item["label"] for item in items])
        found[title] = inspect_autoencoder(
            vae,
            torch.stack([item["image"] for item in items]),
            labels,
            method=method,  # type: ignore[arg-type]
        )
    files = draw_inspection(found, out)
    (out / "inspection.json").write_text(json.dumps({k: v.to_json() for k, v in found.items()}, indent=1))
    Console().print(inspection_table(found))
    typer.echo("\n".join(map(str, [*files, out / "inspection.json"])))


def trained_resolution(folder: Path) -> int:
    """Side in pixels of the images that the run of an autoencoder's folder was trained on."""
    recipe = folder.resolve().parent / "config.yaml"
    if not recipe.is_file():
        raise DavaeError(f"{folder} is not in a run, so its resolution is not known: give --resolution")
    return int(yaml.safe_load(recipe.read_text())["data"]["resolution"])


def autoencoder_title(folder: Path) -> str:
    """A run's name where the folder is one's result, else the folder's."""
    return folder.resolve().parent.name if folder.name == "autoencoder" else folder.name


def inspection_table(found: dict[str, Inspection]) -> Table:
    """The figures for people, a column an autoencoder."""
    table = Table()
    table.add_column("")
    for title in found:
        table.add_column(title, justify="right")

    def row(name: str, values: list[float | None], form: str) -> None:
        table.add_row(name, *("-" if v is None else format(v, form) for v in values))

    some = list(found.values())
    for kind, told in (
        ("whole", "PSNR, reconstruction"),
        ("zeroed", "PSNR, details zeroed"),
        ("shuffled", "PSNR, details shuffled"),
        ("base", "PSNR, base enlarged"),
    ):
        row(told, [i.psnr.get(kind) for i in some], ".2f")
    row("alignment error, relative", [i.alignment_error for i in some], ".3f")
    for part in ("base", "detail", "structured"):
        row(f"linear probe, {part}", [i.parts[part].linear_probe for i in some], ".1%")
        row(f"nearest neighbours, {part}", [i.parts[part].nearest_neighbours for i in some], ".1%")
    row("chance", [i.chance for i in some], ".1%")
    for part in ("base", "detail"):
        row(f"high-frequency share, {part}", [i.parts[part].high_frequency_share for i in some], ".3f")
        row(
            f"local - distant similarity, {part}",
            [i.parts[part].local_distant_similarity for i in some],
            ".3f",
        )
    row("high-frequency share, images", [i.image_high_frequency_share for i in some], ".3f")
    return table
