"""``davae bench training``: a step of both stages beside its plain form."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from rich.table import Table

from davae.choices import Precision
from davae.cli.options import Json, Repeats
from davae.cli.output import wide_console, write_figures
from davae.training.benchmark import StepProfile, TrainingBenchmark, bench_training
from davae.training.benchmark.side_by_side import STAGES, StageName

Tune = Literal["full", "lora"]


def training(
    base: Annotated[
        str, typer.Argument(help="tiny, a bundled configuration, a name on the hub, or a pipeline folder.")
    ],
    resolution: Annotated[int, typer.Option("--resolution", min=1, help="Side of the full image.")] = 256,
    scale: Annotated[int, typer.Option("--scale", min=1)] = 2,
    detail_channels: Annotated[int | None, typer.Option("--detail-channels", min=1, help="D.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images a step.")] = 4,
    stage: Annotated[
        StageName | None, typer.Option("--stage", help="One of them alone (default both).")
    ] = None,
    gan: Annotated[bool, typer.Option("--gan", help="With the adversarial term.")] = False,
    tune: Annotated[Tune, typer.Option("--tune", help="Which weights of the transformer learn.")] = "full",
    precision: Annotated[Precision, typer.Option("--precision", help="Of autocast.")] = "no",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile in the fast forms.")] = False,
    repeats: Repeats = 5,
    profile: Annotated[bool, typer.Option("--profile", help="Also what bounds a step.")] = False,
    json_file: Json = None,
) -> None:
    """A training step of both stages with random weights: plain, fast, and from cached latents and text."""
    result = bench_training(
        base,
        resolution=resolution,
        scale=scale,
        detail_channels=detail_channels,
        batch=batch,
        stages=(stage,) if stage else STAGES,
        gan=gan,
        tune=tune,
        precision=precision,
        compile=compile,
        repeats=repeats,
        profile=profile,
    )
    console = wide_console()
    console.print(training_table(result))
    for name, found in result.profiles.items():
        console.print(profile_table(name, found))
    write_figures(json_file, result.to_json())


def training_table(result: TrainingBenchmark) -> Table:
    """The rows for people."""
    title = (
        f"{result.base}: {result.device}, {result.resolution} px, batch {result.batch}, "
        f"precision {result.precision}, {result.repeats} rounds"
    )
    table = Table(title=title + (", compiled" if result.compiled else ""))
    for column in ("stage", "form", "s / step", "images/s", "memory", "speed-up", "memory over plain"):
        table.add_column(column, justify="left" if column in ("stage", "form") else "right")
    for row in result.rows:
        table.add_row(
            row.stage,
            row.form,
            f"{row.step_seconds:.3g}",
            f"{row.images_per_second:.3g}",
            f"{row.memory_bytes / 2**20:.0f} MiB",
            f"{row.speedup:.2f}x",
            f"{row.memory_over_plain:.2f}x",
        )
    return table


def profile_table(stage: str, found: StepProfile) -> Table:
    """Where the time of the cached form goes."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in found.parts.items())
    table = Table(title=f"{stage} step: {parts}")
    for column in ("operator", "ms", "share", "calls"):
        table.add_column(column, justify="left" if column == "operator" else "right")
    for line in found.operators:
        table.add_row(line.name, f"{line.seconds * 1e3:.1f}", f"{line.share:.0%}", str(line.calls))
    return table
