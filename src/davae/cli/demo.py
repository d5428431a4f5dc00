"""``davae demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from davae.cli.options import LAST_SEED, new_folder
from davae.demo import run_demo


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(demo)


def demo(
    out: Annotated[Path, typer.Option(help="Run directory.", callback=new_folder)] = Path("runs/demo"),
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of the trainings and the samples.")
    ] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: does it work here?")] = False,
    data: Annotated[
        str | None, typer.Option(help="Your images instead of the procedural scenes: a folder or data set.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name, or a YAML file.")] = "tiny",
) -> None:
    """The whole method on the embedded base: both stages, samples, report. No download, no GPU."""
    report = run_demo(out, seed=seed, quick=quick, data=data, recipe=recipe)
    summary = json.loads((report.parent / "summary.json").read_text())
    console = Console()
    table = Table("", "base", "native", "upgraded", title="what an image costs")
    for row, unit, scale in (
        ("tokens", "", 1),
        ("flops_per_image", "GFLOP", 1e-9),
        ("seconds_per_image", "s", 1),
    ):
        values = [f"{summary[row][k] * scale:.4g}" for k in ("base", "native", "upgraded")]
        table.add_row(f"{row.replace('_', ' ')} {unit}".strip(), *values)
    console.print(table)
    r, g = summary["reconstruction"], summary["generation"]
    console.print(
        f"reconstruction: {r['psnr_upgraded']:.2f} dB, base upscaled {r['psnr_base_upscaled']:.2f} dB\n"
        f"samples against real images (sliced Wasserstein, finest level, lower is better): "
        f"{g['swd_finest_upgraded']:.3f}, base upscaled {g['swd_finest_base_upscaled']:.3f}\n"
        f"{summary['wall_seconds']:.0f} s, {summary['peak_memory_bytes'] / 2**30:.1f} GiB at most",
        highlight=False,
    )
    typer.echo(f"report: {report}")
