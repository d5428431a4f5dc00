"""``davae evaluate generation`` as a function."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from diffusers import DiffusionPipeline

from davae.bases.open import is_built_in, load_base
from davae.errors import DavaeError
from davae.evaluation.features import TextImageNetwork
from davae.evaluation.features.open import open_networks, or_unavailable
from davae.evaluation.generation.baselines import generate_variants
from davae.evaluation.generation.compare import GenerationReport, compare_generation, open_reference
from davae.evaluation.generation.image_run import RunSettings, write_geneval_folder
from davae.evaluation.metrics.names import CLIP_SCORE
from davae.evaluation.upscalers import check_upscaler, open_upscaler
from davae.pipelines.saving.opening import pipeline_place
from davae.runtime.console import track
from davae.runtime.devices import chosen_device, wanted_dtype
from davae.runtime.places import check_place, safe_name
from davae.runtime.processes import UNEVEN_WAIT, claimed_by_first, start_processes, wait_for_everyone

logger = logging.getLogger(__name__)


def evaluate_generation(
    pipeline: str | Path,
    reference: str | Path,
    *,
    out: str | Path = "generation",
    base: str | None = None,
    beside: Mapping[str, str] | None = None,
    upscalers: Mapping[str, str] | None = None,
    count: int | None = None,
    prompts: Path | None = None,
    features: Sequence[str] | None = None,
    clip: str | None = None,
    reference_images: int | None = None,
    save_statistics: Path | None = None,
    seed: int = 0,
    batch: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> GenerationReport | None:
    """Generate images, then measure them. A repeated call generates what is missing; all processes must call this.

    Args:
        pipeline: a folder, a run, a name on the hub, ``tiny`` or ``debug``.
        reference: images, as in a recipe's ``data.path``, or an ``.npz`` of statistics.
        out: folder of the images.
        base: the base pipeline, measured enlarged, decoded by the upgrade's joint decoder alone, and at full
            resolution.
        beside: further pipelines by the name they are reported under.
        upscalers: by the name they are reported under, what enlarges the base's images, see
            :func:`davae.evaluation.upscalers.open_upscaler`; needs ``base``.
        count: images of each; by default one per prompt (GenEval: four), or 50,000 for classes.
        prompts: text, MJHQ-30K ``.json`` or GenEval ``.jsonl``; by default the captions of the reference's images.
        features: feature networks (:func:`davae.evaluation.features.open_network`); by default ``inception``.
        clip: a CLIP model, for the CLIP score.
        reference_images: maximum number of reference images; by default all.
        save_statistics: ``.npz`` for the moments of the reference's features.
        seed: of image 0; the next ones count up.
        batch: images in one call.
        steps, guidance, height, width: the pipeline's own by default.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default as saved.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the GPU, if any.

    Returns:
        All figures, and reasons for the missing ones; ``None`` in all processes but the first.

    Raises:
        DavaeError: a pipeline or the reference cannot be opened, prompts do not fit the pipeline, or ``out`` holds
            images of other settings.
    """
    precision, wanted = wanted_dtype(dtype), chosen_device(device)
    check_place(out, "generation")
    for name in (str(pipeline), *([] if base is None else [base]), *(beside or {}).values()):
        if not is_built_in(name):
            pipeline_place(name)
    for name, place in (upscalers or {}).items():
        check_upscaler(name, place)
    compared = open_reference(str(reference), limit=reference_images)
    state = start_processes(cpu=device == "cpu", timeout=UNEVEN_WAIT)
    where = str(state.device) if state.num_processes > 1 else wanted
    unavailable: dict[str, str] = {}
    networks, clip_network = [], None
    if state.is_main_process:  # before the images: what is missing should be known early
        networks = open_networks(["inception"] if features is None else features, where, unavailable)
        if clip is not None:
            clip_network = or_unavailable(CLIP_SCORE, lambda: TextImageNetwork(clip, device=where), unavailable)
        if save_statistics and (len(networks) != 1 or compared.moments or save_statistics.suffix != ".npz"):
            raise DavaeError(
                "--save-statistics writes the moments of reference images by one feature network to a .npz file: give "
                "images as the reference, and one --features that can be had"
            )
        for name, reason in unavailable.items():
            logger.warning("%s will not be measured: %s", name, reason)
    with claimed_by_first(Path(out), "generation"):
        wait_for_everyone()  # nobody writes before the folder is claimed
        variants = generate_variants(
            lambda name: _open_pipeline(name, precision, where),
            RunSettings(
                str(pipeline),
                {},
                seed,
                batch,
                steps=steps,
                guidance=guidance,
                height=height,
                width=width,
                dtype=dtype or "saved",
            ),
            out,
            base=base,
            others=beside,
            upscalers={name: partial(open_upscaler, name, place, where) for name, place in (upscalers or {}).items()},
            prompts=prompts,
            captions=compared.captions,
            count=count,
            progress=partial(_progress, shown=state.is_main_process),
        )
        if not state.is_main_process:
            return None
        if variants.prompts.kind == "classes" and clip is not None:
            clip_network, unavailable[CLIP_SCORE] = None, "the pipeline makes images of classes, not of texts"
        report = compare_generation(
            variants.models,
            compared,
            networks=networks,
            clip=clip_network,
            prompts=variants.prompts,
            unavailable=unavailable | variants.unavailable,
            save_statistics_to=save_statistics,
        )
        if variants.prompts.kind == "geneval":
            for name, run in variants.runs.items():
                write_geneval_folder(run, variants.prompts, variants.count, Path(out) / "geneval" / safe_name(name))
        runs = {name: run.describe() | {"folder": str(run.folder)} for name, run in variants.runs.items()}
        return replace(
            report,
            runs=runs,
            meanings=variants.meanings,
            seconds=variants.seconds,
            upscalers=variants.upscalers,
        )


def _open_pipeline(name: str, dtype: torch.dtype | Literal["saved"], device: str) -> DiffusionPipeline:
    pipe = load_base(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _progress(made: Iterable[int], name: str, missing: int, *, shown: bool) -> Iterable[int]:
    return track(made, name, total=missing, disable=not shown)
