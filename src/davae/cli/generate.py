"""``davae generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track

from davae.cli.options import LAST_SEED, Device, ModelDType, new_folder
from davae.errors import DavaeError
from davae.pipelines.placing import chosen_device, wanted_dtype
from davae.pipelines.sampling.generate import generate_images, read_prompts, takes_prompts
from davae.pipelines.sampling.speed import speed_up
from davae.training.run import load_base


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command()(generate)


def generate(
    pipeline: Annotated[
        str,
        typer.Argument(help="'tiny', a pipeline's folder or a run, or a name on the hub; base or upgraded."),
    ],
    labels: Annotated[
        list[str] | None, typer.Argument(help="Class names or numbers, of a class-conditional pipeline.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt, of a text-to-image pipeline; can be given again.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file of prompts, one a line.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.", callback=new_folder)] = Path("samples"),
    seed: Annotated[
        int, typer.Option(min=0, max=LAST_SEED, help="Seed of the first image; the next count up.")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images of each.")] = 1,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampling steps; the pipeline's own default.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale; 1 is none. The pipeline's own default.")
    ] = None,
    negative: Annotated[str | None, typer.Option(help="A prompt to guide away from.")] = None,
    height: Annotated[int | None, typer.Option(min=1, help="Pixels; the pipeline's own default.")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Pixels; the pipeline's own default.")] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Every measure for speed that changes images by rounding alone.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile repeated blocks: slow at first, with --fast.")
    ] = False,
    attention: Annotated[
        str | None, typer.Option("--attention", help="diffusers' attention backend, with --fast.")
    ] = None,
    device: Device = None,
    dtype: ModelDType = None,
) -> None:
    """Images of prompts or of classes, one PNG each."""
    if (compile or attention) and not fast:
        raise DavaeError("--compile and --attention belong to --fast: give it too")
    where = chosen_device(device)
    texts = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    pipe = load_base(pipeline, dtype=wanted_dtype(dtype, where)).to(where)
    if fast:  # its measures follow from the device
        speed_up(pipe, compile=compile, attention=attention)
    pipe.set_progress_bar_config(disable=True)
    subjects, wrong = (texts, labels) if takes_prompts(pipe) else (labels, texts)
    if wrong or not subjects:
        wanted = "prompts: give --prompt or --prompts" if takes_prompts(pipe) else "classes: give their names"
        raise DavaeError(f"{type(pipe).__name__} makes images of {wanted}")
    images = generate_images(
        pipe,
        subjects,
        count=count,
        seed=seed,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative,
        height=height,
        width=width,
    )
    total = count * len(subjects)
    for made in track(images, "generating", total=total, transient=True):
        out.mkdir(parents=True, exist_ok=True)  # where nothing can be made, none is left behind
        made.image.save(out / made.file_name)
    typer.echo(f"{total} images of {made.image.width} x {made.image.height} pixels in {out}")
