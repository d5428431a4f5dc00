"""``davae generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import track

from davae.training.run import load_base


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(generate)


def generate(
    pipeline: Annotated[str, typer.Argument(help="A class-conditional pipeline: 'tiny', or a folder.")],
    labels: Annotated[list[str], typer.Argument(help="Class names or numbers, one image each.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("samples"),
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is none.")] = 3.0,
) -> None:
    """Images of the given classes, one PNG each."""
    pipe = load_base(pipeline)
    pipe.set_progress_bar_config(disable=True)
    out.mkdir(parents=True, exist_ok=True)
    for i, label in enumerate(track(labels, "generating", transient=True)):
        image = pipe(
            int(label) if label.isdecimal() else label,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed + i),
        ).images[0]
        image.save(out / f"{label}-{seed + i}.png")
    typer.echo(f"{len(labels)} images of {image.width} x {image.height} pixels in {out}")
