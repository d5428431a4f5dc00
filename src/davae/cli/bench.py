"""``davae bench inference | autoencoder | training``: measured side by side in one process."""

from typing import Annotated, Literal, get_args

import typer

from davae.choices import Precision
from davae.cli.options import Device, DType, Json, Repeats, write_figures
from davae.runtime.console import wide_console

app = typer.Typer(no_args_is_help=True)

Base = Annotated[str, typer.Argument(help="A bundled configuration, a name on the hub, or a pipeline folder.")]
Resolution = Annotated[int, typer.Option("--resolution", min=1, help="Side of the full image in pixels.")]
Details = Annotated[int | None, typer.Option("--detail-channels", min=1, help="D (default: by scale).")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")]
Compile = Annotated[bool, typer.Option("--compile", help="torch.compile for all models.")]
Stage = Literal["autoencoder", "diffusion"]
Form = Literal["fast", "fast, cached"]
Tune = Literal["full", "lora"]


@app.command()
def inference(
    base: Base,
    resolution: Resolution = 1024,
    scale: Annotated[list[int] | None, typer.Option("--scale", min=1, help="Can be given again (default 2).")] = None,
    detail_channels: Details = None,
    batch: Batch = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Denoising steps (default: the pipeline's).")
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
    """Seconds, FLOPs and memory per image of base, native, upgraded and decoder alone, with random weights."""
    from davae.benchmark.inference import bench_inference

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
    write_figures(json_file, result.to_json())
    from davae.cli.tables import inference_table

    wide_console().print(inference_table(result))


@app.command()
def autoencoder(
    base: Base,
    resolution: Resolution = 1024,
    scale: Annotated[int, typer.Option("--scale", min=1)] = 2,
    detail_channels: Details = None,
    batch: Batch = 1,
    repeats: Repeats = 5,
    tile: Annotated[int | None, typer.Option("--tile", min=1, help="Also with tiles of this side in pixels.")] = None,
    device: Device = None,
    dtype: DType = "float32",
    compile: Compile = False,
    json_file: Json = None,
) -> None:
    """Encoding and decoding speed of the upgraded autoencoder, its decoder alone, and the base VAE."""
    from davae.benchmark.autoencoder import bench_autoencoder

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
    write_figures(json_file, result.to_json())
    from davae.cli.tables import autoencoder_table

    wide_console().print(autoencoder_table(result))


@app.command()
def training(
    base: Annotated[
        str, typer.Argument(help="tiny, a bundled configuration, a name on the hub, or a pipeline folder.")
    ],
    resolution: Annotated[int, typer.Option("--resolution", min=1, help="Side of the full image in pixels.")] = 256,
    scale: Annotated[int, typer.Option("--scale", min=1)] = 2,
    detail_channels: Annotated[
        int | None, typer.Option("--detail-channels", min=1, help="D (default: by scale).")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images per step.")] = 4,
    stage: Annotated[Stage | None, typer.Option("--stage", help="One stage alone (default: both).")] = None,
    form: Annotated[Form | None, typer.Option("--form", help="The one to compare with plain (default: both).")] = None,
    gan: Annotated[bool, typer.Option("--gan", help="With the adversarial term.")] = False,
    official: Annotated[bool, typer.Option("--official", help="Stage 1 with the official SD3 code's losses.")] = False,
    lpips: Annotated[str | None, typer.Option("--lpips", help="VGG-16 file: LPIPS in the official losses.")] = None,
    tune: Annotated[Tune, typer.Option("--tune", help="Which weights of the transformer are trained.")] = "full",
    precision: Annotated[Precision, typer.Option("--precision", help="Precision of autocast.")] = "no",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile in the fast forms.")] = False,
    repeats: Repeats = 5,
    profile: Annotated[bool, typer.Option("--profile", help="Also profile where a step's time goes.")] = False,
    json_file: Json = None,
) -> None:
    """Time and memory of a training step with random weights: plain, fast, and from cached latents and text."""
    from davae.benchmark.training import bench_training

    result = bench_training(
        base,
        resolution=resolution,
        scale=scale,
        detail_channels=detail_channels,
        batch=batch,
        stages=(stage,) if stage else get_args(Stage),
        forms=("plain", form) if form else ("plain", *get_args(Form)),
        gan=gan,
        official=official,
        lpips=lpips,
        tune=tune,
        precision=precision,
        compile=compile,
        repeats=repeats,
        profile=profile,
    )
    write_figures(json_file, result.to_json())
    from davae.cli.tables import print_training

    print_training(wide_console(), result)
