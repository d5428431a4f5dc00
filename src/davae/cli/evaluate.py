"""``davae evaluate reconstruction | generation``: image quality."""

from pathlib import Path
from typing import Annotated

import typer

from davae.choices import LAST_SEED
from davae.cli.options import (
    Device,
    FeatureNames,
    Json,
    ModelDType,
    Upscalers,
    folder_of,
    named_values,
    new_file,
    some_images,
    upscalers_of,
    write_figures,
)
from davae.runtime.console import say


def reconstruction(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained autoencoder.")],
    data: Annotated[
        str, typer.Option("--data", help="Images, as in a recipe (see docs/data.md).", callback=some_images)
    ],
    beside: Annotated[
        list[str] | None,
        typer.Option(
            "--beside", help="NAME=FOLDER of another trained autoencoder to compare with; can be given again."
        ),
    ] = None,
    upscaler: Upscalers = None,
    resolution: Annotated[
        int | None, typer.Option("--resolution", min=1, help="Side in pixels (default: the run's).")
    ] = None,
    images: Annotated[int, typer.Option("--images", min=1, help="How many, spaced evenly over the data set.")] = 256,
    crops: Annotated[
        list[str] | None,
        typer.Option("--crops", help="NAME=FOLDER of crops measured separately, such as text; can be given again."),
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option("--boxes", help="Table (.csv) of named boxes in image files, measured separately.")
    ] = None,
    features: FeatureNames = None,
    lpips: Annotated[Path | None, typer.Option("--lpips", help="torchvision's VGG-16 weights, for LPIPS.")] = None,
    dino: Annotated[
        Path | None, typer.Option("--dino", help="Folder of a DINO network, for the DINO distance.")
    ] = None,
    device: Device = None,
    dtype: ModelDType = None,
    json_file: Json = None,
) -> None:
    """Compare an autoencoder with baselines: decoder alone, base enlarged and at full size, reduced image."""
    others = named_values(beside, "--beside", "trained-alone=runs/alone/autoencoder")
    upscalers = upscalers_of(upscaler)
    folders = named_values(crops, "--crops", "lettering=crops/lettering")
    from davae.cli.tables import print_figures
    from davae.evaluation.reconstruction.evaluate import evaluate_reconstruction

    found = evaluate_reconstruction(
        autoencoder,
        data,
        beside=others,
        upscalers=upscalers,
        resolution=resolution,
        images=images,
        crops=folders,
        boxes=boxes,
        features=features,
        lpips=lpips,
        dino=dino,
        device=device,
        dtype=dtype,
    )
    write_figures(json_file, found.to_json())
    print_figures(found.figures(), found.unavailable, found.meanings())
    if json_file is not None:
        say(json_file)


def generation(
    pipeline: Annotated[str, typer.Argument(help="A pipeline folder, a run, a name on the hub, or 'tiny'.")],
    reference: Annotated[str, typer.Option("--reference", help="Images, as in a recipe, or an .npz of statistics.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder of the images; the same command continues.", callback=folder_of("generation")
        ),
    ] = Path("generation"),
    base: Annotated[
        str | None,
        typer.Option("--base", help="The base pipeline, to compare with: enlarged, native, and its decoder alone."),
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--beside", help="NAME=PIPELINE to compare with; can be given again."),
    ] = None,
    upscaler: Upscalers = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, help="Images (default: one per prompt, or 50000 for classes).")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Text, MJHQ-30K .json or GenEval .jsonl (default: the reference's captions)."),
    ] = None,
    features: FeatureNames = None,
    clip: Annotated[str | None, typer.Option("--clip", help="A CLIP model, for the CLIP score.")] = None,
    reference_images: Annotated[
        int | None, typer.Option("--reference-images", min=1, help="At most this many (default: all).")
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option("--save-statistics", help="Write the reference's mu and sigma to this .npz.", callback=new_file),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, max=LAST_SEED, help="Of image 0; the others count up.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images at a time.")] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help="Sampling steps; default: the pipeline's.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Scale (default: the pipeline's).")] = None,
    height: Annotated[int | None, typer.Option("--height", min=1, help="Pixels, full resolution.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Pixels, full resolution.")] = None,
    dtype: ModelDType = None,
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Generate images, then measure them. The same command continues a stopped run; torchrun divides the work."""
    others = named_values(beside, "--beside", "equal-tokens=PIPELINE")
    upscalers = upscalers_of(upscaler)
    from davae.cli.tables import print_figures
    from davae.evaluation.generation.evaluate import evaluate_generation

    found = evaluate_generation(
        pipeline,
        reference,
        out=out,
        base=base,
        beside=others,
        upscalers=upscalers,
        count=count,
        prompts=prompts,
        features=features,
        clip=clip,
        reference_images=reference_images,
        save_statistics=save_statistics,
        seed=seed,
        batch=batch,
        steps=steps,
        guidance=guidance,
        height=height,
        width=width,
        dtype=dtype,
        device=device,
    )
    if found is not None:
        write_figures(json_file or out / "evaluation.json", found.to_json())
        print_figures(found.figures(), found.missing(), found.meanings)
        say(json_file or out / "evaluation.json")


app = typer.Typer(no_args_is_help=True)
app.command()(reconstruction)
app.command()(generation)
