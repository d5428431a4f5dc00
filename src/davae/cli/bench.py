"""``davae bench inference | autoencoder | training``: measured side by side in one process."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from davae.benchmark.autoencoder import AutoencoderBenchmark, bench_autoencoder
from davae.benchmark.inference import InferenceBenchmark, bench_inference
from davae.cli.bench_training import training
from davae.cli.options import Device, DType, Json, Repeats
from davae.cli.output import wide_console, write_figures

app = typer.Typer(no_args_is_help=True)
app.command()(training)

Base = Annotated[
    str, typer.Argument(help="A bundled configuration, a name on the hub, or a pipeline folder.")
]
Resolution = Annotated[int, typer.Option("--resolution", min=1, help="Side of the full image in pixels.")]
Details = Annotated[int | None, typer.Option("--detail-channels", min=1, help="D.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile on both sides.")]


@app.command()
def inference(
    base: Base,
    resolution: Resolution = 1024,
    scale: Annotated[
        list[int] | None, typer.Option("--scale", min=1, help="May be given twice (default 2).")
    ] = None,
    detail_channels: Details = None,
    batch: Batch = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Denoising steps (default the pipeline's).")
    ] = None,
    repeats: Repeats = 5,
    device: Device = None,
    dtype: DType = "float32",
    attention: Annotated[str, typer.Option("--attention", help="diffusers' attention backend.")] = "native",
    compile: Compile = False,
    text: Annotated[bool, typer.Option(help="Time the text encoders too.")] = True,
    end_to_end: Annotated[bool, typer.Option("--end-to-end", help="Also time whole images.")] = False,
    json_file: Json = None,
) -> None:
    """Base, native and upgraded model with random weights: seconds, operations and memory of an image."""
    result = bench_inference(
        base,
        resolution=resolution,
        scales=tuple(scale or (2,)),
        detail_channels=detail_channels,
        batch=batch,
        steps=steps,
        repeats=repeats,
        device=device,
        dtype=dtype,
        attention=attention,
        compile=compile,
        text=text,
        end_to_end=end_to_end,
    )
    wide_console().print(inference_table(result))
    write_figures(json_file, result.to_json())


@app.command()
def autoencoder(
    base: Base,
    resolution: Resolution = 1024,
    scale: Annotated[int, typer.Option("--scale", min=1)] = 2,
    detail_channels: Details = None,
    batch: Batch = 1,
    repeats: Repeats = 5,
    tile: Annotated[
        int | None, typer.Option("--tile", min=1, help="Also by tiles of this side in pixels.")
    ] = None,
    device: Device = None,
    dtype: DType = "float32",
    compile: Compile = False,
    json_file: Json = None,
) -> None:
    """Encode and decode of the upgraded autoencoder and of the base VAE at the same resolution."""
    result = bench_autoencoder(
        base,
        resolution=resolution,
        scale=scale,
        detail_channels=detail_channels,
        batch=batch,
        repeats=repeats,
        tile=tile,
        device=device,
        dtype=dtype,
        compile=compile,
    )
    wide_console().print(autoencoder_table(result))
    write_figures(json_file, result.to_json())


def inference_table(result: InferenceBenchmark) -> Table:
    """The rows for people."""
    title = f"{result.base}: {result.device}, {result.dtype}, batch {result.batch}, {result.repeats} rounds"
    table = Table(title=title + (", compiled" if result.compiled else ""))
    whole = any(row.whole_image_seconds is not None for row in result.rows)
    for column in (
        "",
        "pixels",
        "tokens",
        "s / text",
        "s / step",
        "s / decode",
        "s / image",
        *(["s, whole image"] if whole else []),
        "TFLOP",
        "TFLOP/s",
        "memory",
        "speed-up",
        "FLOP-limited",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        operations = row.text_flops + row.steps * row.step_flops + row.decode_flops
        table.add_row(
            row.name,
            str(row.resolution),
            str(row.tokens),
            "no encoders" if row.text_seconds is None else f"{row.text_seconds:.3g}",
            f"{row.step_seconds:.3g}",
            f"{row.decode_seconds:.3g}",
            f"{row.image_seconds:.3g}",
            *([f"{row.whole_image_seconds:.3g}"] if row.whole_image_seconds is not None else []),
            f"{operations / 1e12:.3g}",
            f"{row.achieved_flops / 1e12:.3g}",
            "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**30:.1f} GiB",
            f"{row.speedup if row.whole_image_speedup is None else row.whole_image_speedup:.2f}x",
            f"{row.flop_limited_speedup:.2f}x ({row.share:.0%})",
        )
    return table


def autoencoder_table(result: AutoencoderBenchmark) -> Table:
    """The rows for people."""
    table = Table(title=f"{result.base}: {result.device}, {result.dtype}, {result.resolution} px")
    for column in ("", "encode, images/s", "decode, images/s", "decode over base", "decode memory"):
        table.add_column(column, justify="left" if not column else "right")
    for row in result.rows:
        table.add_row(
            row.name,
            f"{row.encode_images_per_second:.3g}",
            f"{row.decode_images_per_second:.3g}",
            f"{row.decode_over_base:.2f}x",
            f"{row.decode_memory_bytes / 2**20:.0f} MiB",
        )
    return table
