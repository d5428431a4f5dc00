"""``davae inspect``: what a trained autoencoder's latent holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml
from rich.table import Table

from davae.cli.options import Device, new_folder
from davae.cli.output import wide_console, write_figures
from davae.data import ImageDataset, RenderedDataset, open_dataset
from davae.errors import DavaeError
from davae.evaluation.inspection import Inspection, inspect_autoencoder
from davae.pipelines.placing import chosen_device
from davae.pipelines.saving.opening import autoencoder_folder, load_autoencoder
from davae.report.inspection import draw_inspection


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("inspect")(_inspect)


def _inspect(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Images, as in a recipe (see docs/data.md; default: those the run held out)."
        ),
    ] = None,
    beside: Annotated[
        list[Path] | None,
        typer.Option(
            "--beside", help="Another autoencoder, such as one without alignment; can be given again."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder of the pictures and inspection.json.", callback=new_folder),
    ] = Path("inspection"),
    images: Annotated[
        int, typer.Option("--images", min=1, help="How many images, evenly from the whole set.")
    ] = 256,
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Side in pixels (default: the run's).")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="tsne or pca.")] = "tsne",
    device: Device = None,
) -> None:
    """Class maps, spectra, channel statistics, and reconstruction with the details zeroed and shuffled."""
    if method not in ("tsne", "pca"):
        raise DavaeError(f"--method must be tsne or pca, not '{method}'")
    where = chosen_device(device)
    folders = named_folders([autoencoder, *(beside or [])])
    # One set for all: an autoencoder beside was trained on other images perhaps.
    dataset = _images(autoencoder, data, resolution or trained_resolution(autoencoder))
    count = min(images, len(dataset))
    items = [dataset[i * len(dataset) // count] for i in range(count)]
    labels = torch.tensor([item["label"] for item in items])
    found: dict[str, Inspection] = {}
    for title, folder in folders.items():
        found[title] = inspect_autoencoder(
            load_autoencoder(folder).to(where),
            torch.stack([item["image"] for item in items]),
            labels,
            method=method,  # type: ignore[arg-type]
        )
    files = draw_inspection(found, out)
    write_figures(out / "inspection.json", {k: v.to_json() for k, v in found.items()})
    wide_console().print(inspection_table(found))
    typer.echo("\n".join(map(str, [*files, out / "inspection.json"])))


def named_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Autoencoders by title; of equal titles the later ones are numbered."""
    named: dict[str, Path] = {}
    for folder in folders:
        title = autoencoder_title(autoencoder_folder(folder))
        again = sum(name.partition(" (")[0] == title for name in named)
        named[f"{title} ({again + 1})" if again else title] = folder
    return named


def _images(folder: Path, data: str | None, resolution: int) -> ImageDataset | RenderedDataset:
    """What was asked for, else the images that the folder's run did not learn from."""
    if data is not None:
        return open_dataset(data, resolution=resolution)
    settings = _run_data(folder)
    if settings is None or not settings["hold_out"]:
        raise DavaeError(f"{folder} is in no run that held images out: name images with --data")
    return open_dataset(
        settings["path"],
        resolution=resolution,
        split=settings["split"],
        hold_out=settings["hold_out"],
        part="held_out",
    )


def trained_resolution(folder: Path) -> int:
    """Side in pixels of the images that the run of an autoencoder's folder was trained on."""
    settings = _run_data(folder)
    if settings is None:
        raise DavaeError(f"{folder} is not in a run, so its resolution is not known: give --resolution")
    return int(settings["resolution"])


def _run_data(folder: Path) -> dict[str, Any] | None:
    """The section ``data`` of the recipe of a folder's run; none where the folder is not in one."""
    recipe = folder.resolve().parent / "config.yaml"
    return yaml.safe_load(recipe.read_text())["data"] if recipe.is_file() else None


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
        row("   its deviation over splits", [i.parts[part].linear_probe_std for i in some], ".1%")
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
