"""``davae evaluate generation``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from davae.cli.evaluate_parts import named, open_networks, optional, report, write_json
from davae.cli.options import LAST_SEED, Device, DType, FeatureNames, Json, new_file, new_folder
from davae.errors import DavaeError

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

    from davae.evaluation.image_set import Distances

logger = logging.getLogger(__name__)


def generation(
    pipeline: Annotated[str, typer.Argument(help="A pipeline folder, a run, a hub name, or 'tiny'.")],
    reference: Annotated[
        str, typer.Option("--reference", help="Images, as in a recipe, or an .npz of statistics.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="Folder of the images; the same command continues.", callback=new_folder),
    ] = Path("generation"),
    base: Annotated[
        str | None, typer.Option("--base", help="The base pipeline, measured beside: upscaled, and native.")
    ] = None,
    beside: Annotated[
        list[str] | None,
        typer.Option("--beside", help="NAME=PIPELINE, such as another of equal tokens; can be given again."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option("--count", min=1, help="Images (default: every prompt, or 50000 of classes)."),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="Text, MJHQ-30K .json or GenEval .jsonl.")
    ] = None,
    features: FeatureNames = None,
    clip: Annotated[str | None, typer.Option("--clip", help="A CLIP model, for the CLIP score.")] = None,
    reference_images: Annotated[
        int | None, typer.Option("--reference-images", min=1, help="At most so many (default: all).")
    ] = None,
    save_to: Annotated[
        Path | None,
        typer.Option(
            "--save-statistics", help="Write the reference's mu and sigma to this .npz.", callback=new_file
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=LAST_SEED, help="Of image 0; the next count up.")
    ] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Images in one call.")] = 1,
    steps: Annotated[int | None, typer.Option("--steps", min=1, help="The pipeline's own default.")] = None,
    guidance: Annotated[float | None, typer.Option("--guidance", help="The pipeline's own default.")] = None,
    height: Annotated[int | None, typer.Option("--height", min=1, help="Pixels, full resolution.")] = None,
    width: Annotated[int | None, typer.Option("--width", min=1, help="Pixels, full resolution.")] = None,
    dtype: DType = "float32",
    device: Device = None,
    json_file: Json = None,
) -> None:
    """Generate, then measure. Stopped at any time, the same command continues; under torchrun work is shared."""
    from davae.evaluation.contest import run_contest
    from davae.evaluation.features import TextImageNetwork
    from davae.evaluation.generation import compare_generation, open_reference
    from davae.evaluation.image_run import RunSettings, write_geneval_folder
    from davae.runtime.devices import chosen_device, named_dtype
    from davae.runtime.processes import start_processes

    precision, wanted = named_dtype(dtype), chosen_device(device)
    others = dict(named(text, "--beside", "equal-tokens=PIPELINE") for text in beside or [])
    compared = open_reference(reference, limit=reference_images)
    # Waiting for the slowest process may take hours; torch would give up after minutes.
    state = start_processes(cpu=device == "cpu", timeout=timedelta(days=7))
    where = str(state.device) if state.num_processes > 1 else wanted
    unavailable: dict[str, str] = {}
    networks, clip_network = [], None
    if state.is_main_process:  # before the images: what is missing should be known early
        networks = open_networks(["inception"] if features is None else features, where, unavailable)
        if clip is not None:
            clip_network = optional("clip_score", lambda: TextImageNetwork(clip, device=where), unavailable)
        if save_to is not None and (len(networks) != 1 or compared.moments is not None):
            raise DavaeError(
                "--save-statistics writes the moments of reference images by one feature network: give images as the "
                "reference, and one --features that can be had"
            )
        for name, reason in unavailable.items():
            logger.warning("%s will not be measured: %s", name, reason)
    contest = run_contest(
        lambda name: _open_pipeline(name, precision, where),
        RunSettings(
            pipeline, {}, seed, batch, steps=steps, guidance=guidance, height=height, width=width, dtype=dtype
        ),
        out,
        base=base,
        others=others,
        prompts=prompts,
        count=count,
        progress=_progress(shown=state.is_main_process),
    )
    if not state.is_main_process:
        return
    unavailable |= contest.unavailable
    if contest.prompts.kind == "classes" and clip is not None:
        clip_network, unavailable["clip_score"] = None, "the pipeline makes images of classes, not of texts"
    found = compare_generation(
        contest.models,
        compared,
        networks=networks,
        clip=clip_network,
        prompts=contest.prompts,
        unavailable=unavailable,
        save_statistics_to=save_to,
    )
    about: dict[str, Any] = {
        name: run.describe() | {"folder": str(run.folder)} for name, run in contest.runs.items()
    }
    if contest.prompts.kind == "geneval":
        for name, run in contest.runs.items():
            write_geneval_folder(run, contest.prompts, contest.count, out / "geneval" / name)
    for row in found.rows.values():
        unavailable |= row.unavailable
        for category, part in row.categories.items():
            unavailable |= {f"{category}: {metric}": reason for metric, reason in part.unavailable.items()}
    report({name: _flat(row) for name, row in found.rows.items()}, unavailable)
    write_json(json_file or out / "evaluation.json", {"runs": about} | found.to_json())


def _flat(row: Distances) -> dict[str, float]:
    """Figures of a row, then of its categories the Fréchet distance and the CLIP score; the JSON has all."""
    shown = dict(row.figures)
    for category, part in row.categories.items():
        shown |= {
            f"{category}: {metric}": value
            for metric, value in part.figures.items()
            if metric.startswith("fid/") or metric == "clip_score"
        }
    return shown


def _open_pipeline(name: str, dtype: torch.dtype, device: str) -> DiffusionPipeline:
    from davae.pipelines import load_pipeline
    from davae.training.run import load_base

    made_in_code = name in ("tiny", "debug") or name.startswith("debug-")
    pipe = load_base(name, dtype=dtype) if made_in_code else load_pipeline(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _progress(*, shown: bool) -> Any:
    from rich.progress import track

    def show(made: Iterable[int], name: str, missing: int) -> Iterable[int]:
        return track(made, name, total=missing, transient=True, disable=not shown)

    return show
