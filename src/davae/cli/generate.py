"""``davae generate``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.choices import LAST_SEED, Offload
from davae.cli.options import Device, ModelDType, Variant, folder_of
from davae.runtime.console import say, shown


def generate(
    pipeline: Annotated[
        str, typer.Argument(help="A pipeline's folder or a run, 'tiny' or 'tiny-upgraded', or a name on the hub.")
    ],
    labels: Annotated[
        list[str] | None, typer.Argument(help="Class names or numbers, of a class-conditional pipeline.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, of a text-to-image pipeline; can be given again.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one per line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.", callback=folder_of("images"))] = Path("samples"),
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of the first image; the others count up.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images per prompt or class.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampling steps (default: the pipeline's).")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Scale; 1 is none (default: the pipeline's).")] = None,
    negative: Annotated[str | None, typer.Option(help="A prompt to guide away from.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels (default: the pipeline's).")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels (default: the pipeline's).")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="All optimisations that change images only by rounding.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="With --fast: compile repeated blocks; slow at first.")
    ] = False,
    attention: Annotated[
        str | None, typer.Option("--attention", help="With --fast: diffusers' attention backend.")
    ] = None,
    offload: Annotated[
        Offload | None,
        typer.Option("--offload", help="Weights in main memory, on the GPU only the model or layer that computes."),
    ] = None,
    device: Device = None,
    dtype: ModelDType = None,
    variant: Variant = None,
) -> None:
    """Generate images from prompts or classes, one PNG each."""
    from davae.bases.generate import write_images

    written = write_images(
        pipeline,
        labels or (),
        prompt=prompt or (),
        prompts=prompts,
        out=out,
        seed=seed,
        count=count,
        steps=steps,
        guidance=guidance,
        negative=negative,
        height=height,
        width=width,
        fast=fast,
        compile=compile,
        attention=attention,
        offload=offload,
        device=device,
        dtype=dtype,
        variant=variant,
    )
    made = f"{len(written.files)} image{'s' if len(written.files) > 1 else ''}"
    say(f"{made} of {written.width} x {written.height} pixels in {shown(out)}")
