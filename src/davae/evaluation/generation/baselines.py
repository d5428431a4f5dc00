"""The images of an upgraded pipeline and of its baselines, from the same prompts and seeds."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from davae.data.cache import value_hash
from davae.errors import DavaeError
from davae.evaluation.generation.compare import Batches
from davae.evaluation.generation.image_run import ImageRun, RunSettings, contents_hash
from davae.evaluation.generation.prompts import GENEVAL_SAMPLES, PromptSet, class_set, open_prompt_set
from davae.evaluation.metrics.names import BASE_ENLARGED, BASE_NATIVE, DECODER_ALONE, UPGRADED
from davae.evaluation.upscalers import Upscaler
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.sampling.generate import takes_prompts
from davae.runtime.pictures import to_bytes
from davae.runtime.places import safe_name
from davae.runtime.processes import rank_and_world, wait_for_everyone
from davae.runtime.resizing import upscaled

CLASS_IMAGES = 50_000
"""Default number of images of a class-conditional model, as in published distances."""


Progress = Callable[[Iterable[int], str, int], Iterable[int]]
"""Wraps the iterator over image numbers; called with it, the name of the variant, and the number of missing images."""


@dataclass
class Variants:
    """What was generated.

    Attributes:
        prompts: subjects of the images.
        count: of each.
        runs: by name of the folder, or as they are reported.
        models: images by the name they are reported under; ``meanings`` says what each is.
        seconds: per image, by the same names; missing where an earlier version made the images.
        upscalers: what each upscaler is, by name.
        unavailable: reasons for missing baselines, by name.
    """

    prompts: PromptSet
    count: int
    runs: dict[str, ImageRun] = field(default_factory=dict)
    models: dict[str, Batches] = field(default_factory=dict)
    meanings: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    upscalers: dict[str, dict[str, Any]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, meaning: str, images: Batches, *runs: ImageRun) -> None:
        """Add a model whose images took the seconds of these runs, one after another."""
        self.models[name], self.meanings[name] = images, meaning
        taken = [run.seconds() for run in runs]
        if None not in taken:
            self.seconds[name] = sum(seconds or 0.0 for seconds in taken)


def generate_variants(
    open_pipeline: Callable[[str], DiffusionPipeline],
    settings: RunSettings,
    out: str | Path,
    *,
    base: str | None = None,
    others: Mapping[str, str] | None = None,
    upscalers: Mapping[str, Callable[[], Upscaler]] | None = None,
    prompts: str | Path | None = None,
    captions: Callable[[], Sequence[str]] = list,
    count: int | None = None,
    progress: Progress = lambda made, _name, _missing: made,
) -> Variants:
    """Generate all missing images, divided among the processes of a launcher.

    All processes must call this.

    Args:
        open_pipeline: opens a pipeline by name.
        settings: of the upgraded pipeline, also used for the baselines.
        out: gets a folder each for ``upgraded``, ``base`` (at base resolution), ``native`` (at full), ``decoder-alone``
            (the base decoded by the upgrade's joint decoder without details), the upscalers and the others.
        base: name of the base pipeline; ``None`` for no baselines.
        others: further pipelines by the name they are reported under, such as one with as many tokens but another
            autoencoder; they generate at full resolution, or are resized to it.
        upscalers: functions that open what enlarges the base's images, by the name they are reported under.
        prompts: file of prompts, for pipelines that take them.
        captions: called for prompts if there is no such file.
        count: images of each; by default one per prompt (GenEval: four), or 50,000 for classes.
        progress: displays the progress of this process.

    Raises:
        DavaeError: prompts for a class-conditional pipeline or none for the other kind, a folder of another run,
            two models with one name, or upscalers without a base.
    """
    out, upscalers = Path(out), upscalers or {}
    _check_names([*(others or {}), *upscalers])
    if upscalers and base is None:
        raise DavaeError("upscalers enlarge the base's images: name the base pipeline with --base, or leave them out")
    pipe = open_pipeline(settings.pipeline)
    subjects = find_subjects(pipe, prompts, captions)
    total = _count(count, subjects)
    variants = Variants(subjects, total)
    settings = replace(settings, prompts=subjects.describe())
    upgraded = variants.runs["upgraded"] = _make(pipe, settings, out / "upgraded", variants, progress)
    variants.add(UPGRADED, "the pipeline itself", partial(upgraded.batches, total), upgraded)
    scale, alone = int(getattr(pipe.vae, "scale", 1)), None
    if base is not None:
        alone = _decoder_alone(pipe.vae, variants)
    wait_for_everyone()
    del pipe  # its memory may be needed
    full = (upgraded.size()[0], upgraded.size()[1])
    if base is not None:
        lower = _add_base(open_pipeline(base), alone, base, settings, out, variants, progress, full, scale)
        for name, open_upscaler in upscalers.items():
            _add_upscaler(name, open_upscaler(), lower, out, variants, progress, full)
    for name, pipeline in (others or {}).items():
        pipe = open_pipeline(pipeline)
        sized = replace(settings, pipeline=pipeline)
        if _takes_size(pipe):
            sized = replace(sized, height=full[0], width=full[1])
        run = variants.runs[name] = _make(pipe, sized, out / safe_name(name), variants, progress)
        variants.add(name, f"the pipeline {pipeline}", partial(_upscaled, run, total, full), run)
        wait_for_everyone()
    return variants


def _decoder_alone(vae: object, variants: Variants) -> AutoencoderDA | None:
    """An upgrade's autoencoder without details; None, with the reason in ``variants``, if it has none."""
    if isinstance(vae, AutoencoderDA) and vae.uses_details:
        return vae.without_details()
    upgraded = isinstance(vae, AutoencoderDA)
    variants.unavailable[DECODER_ALONE] = (
        "the pipeline has no details: it is its decoder alone itself" if upgraded else "the pipeline is not upgraded"
    )
    return None


def _add_base(
    pipe: DiffusionPipeline,
    alone: AutoencoderDA | None,
    base: str,
    settings: RunSettings,
    out: Path,
    variants: Variants,
    progress: Progress,
    full: tuple[int, int],
    scale: int,
) -> ImageRun:
    """The base at base resolution, enlarged (equal tokens) and by the joint decoder alone, and at full resolution.

    Returns the run at base resolution.
    """
    total, flexible = variants.count, _takes_size(pipe)
    height, width = (full[0] // scale, full[1] // scale) if flexible else (None, None)
    small = replace(settings, pipeline=base, height=height, width=width)
    large = replace(small, height=full[0], width=full[1]) if flexible else small
    lower = variants.runs["base"] = _make(pipe, small, out / "base", variants, progress)
    if alone is not None:
        _add_decoder_alone(pipe, alone, large, out / safe_name(DECODER_ALONE), variants, progress)
    variants.add(
        BASE_ENLARGED,
        "the base's images at base resolution, enlarged bicubically: equal tokens",
        partial(_upscaled, lower, total, full),
        lower,
    )
    if scale == 1:
        variants.unavailable[BASE_NATIVE] = "the pipeline is not upgraded: it is native itself"
    elif flexible:
        native = variants.runs["native"] = _make(pipe, large, out / "native", variants, progress)
        variants.add(BASE_NATIVE, "the base at full resolution: more tokens", partial(native.batches, total), native)
    else:
        variants.unavailable[BASE_NATIVE] = f"{type(pipe).__name__} takes no height and width"
    wait_for_everyone()
    return lower


def _add_decoder_alone(
    pipe: DiffusionPipeline,
    alone: AutoencoderDA,
    settings: RunSettings,
    folder: Path,
    variants: Variants,
    progress: Progress,
) -> None:
    """The base's own samples, decoded larger by the upgrade's joint decoder without details."""
    try:
        larger = upgrade_pipeline(pipe, alone)
    except DavaeError as error:  # of another base than the upgrade's
        variants.unavailable[DECODER_ALONE] = str(error)
        return
    run = variants.runs[DECODER_ALONE] = _make(larger, settings, folder, variants, progress)
    meaning = "the base's samples, decoded larger by the upgrade's joint decoder without details: equal tokens"
    variants.add(DECODER_ALONE, meaning, partial(run.batches, variants.count), run)


def _add_upscaler(
    name: str,
    upscaler: Upscaler,
    lower: ImageRun,
    out: Path,
    variants: Variants,
    progress: Progress,
    full: tuple[int, int],
) -> None:
    """The images of ``lower`` enlarged by an upscaler, each from its own seed and with its own prompt."""
    total, prompts = variants.count, variants.prompts

    def paint(indices: range) -> list[Image.Image]:
        there = range(indices.start, min(indices.stop, total))
        texts = None if prompts.kind == "classes" else [prompts.subject(i) for i in there]
        seeds = [lower.settings.seed + i for i in there]
        levels = to_bytes(upscaler(lower.images(there), full, seeds=seeds, texts=texts)).to(torch.uint8)
        return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in levels]

    source = {key: value for key, value in lower.describe().items() if key != "pipeline"}
    weights = value_hash({"upscaler": upscaler.weights, "images": source})
    settings = replace(lower.settings, pipeline=upscaler.place, height=full[0], width=full[1], weights=weights)
    run = variants.runs[name] = ImageRun(out / safe_name(name), settings)
    _finish(run, partial(run.fill, paint), variants, progress)
    variants.upscalers[name] = upscaler.describe()
    variants.add(name, f"the base's images enlarged by {upscaler.title}", partial(run.batches, total), lower, run)
    wait_for_everyone()


def _takes_size(pipe: DiffusionPipeline) -> bool:
    return "height" in inspect.signature(type(pipe).__call__).parameters


def _check_names(others: Sequence[str]) -> None:
    taken = {
        "upgraded",
        "base",
        "native",
        "geneval",
        BASE_ENLARGED,
        BASE_NATIVE,
        DECODER_ALONE,
        safe_name(DECODER_ALONE),
    }
    for i, name in enumerate(others):
        if name in others[:i]:
            raise DavaeError(f"'{name}' is given twice, as a pipeline beside and as an upscaler: rename one")
        if not name or Path(name).name != name or name == ".." or name in taken or safe_name(name) in taken:
            raise DavaeError(f"a model beside cannot be called '{name}': it names a row and a folder of its own")


def find_subjects(
    pipe: DiffusionPipeline, prompts: str | Path | None, captions: Callable[[], Sequence[str]] = list
) -> PromptSet:
    """The subjects of the images: the file's prompts, else the captions, or all classes of the transformer.

    Raises:
        DavaeError: the pipeline takes classes and a file was given, or it takes prompts and there are none.
    """
    if takes_prompts(pipe):
        if prompts is not None:
            return open_prompt_set(prompts)
        if not (texts := captions()):
            raise DavaeError(
                f"{type(pipe).__name__} makes images of prompts, and the reference has no captions: name a file of "
                "prompts with --prompts"
            )
        return PromptSet("captions", texts, sha256=value_hash(texts).removeprefix("sha256:"))
    if prompts is not None:
        raise DavaeError(f"{type(pipe).__name__} makes images of classes: leave --prompts out")
    config = pipe.transformer.config
    classes = getattr(config, "num_classes", None) or getattr(config, "num_embeds_ada_norm", None)
    if not classes:
        raise DavaeError(f"{type(pipe.transformer).__name__} does not tell how many classes it knows")
    return class_set(int(classes))


def _count(count: int | None, subjects: PromptSet) -> int:
    if count is not None and count < 2:
        raise DavaeError(f"--count is {count}: distances need at least 2 images")
    if count is None:
        count = CLASS_IMAGES if subjects.kind == "classes" else len(subjects.subjects)
        count *= GENEVAL_SAMPLES if subjects.kind == "geneval" else 1
    return count


def _make(
    pipe: DiffusionPipeline, settings: RunSettings, folder: Path, variants: Variants, progress: Progress
) -> ImageRun:
    run = ImageRun(folder, replace(settings, weights=contents_hash(pipe)))
    _finish(run, partial(run.make, pipe, variants.prompts), variants, progress)
    return run


def _finish(run: ImageRun, make: Callable[..., Iterator[int]], variants: Variants, progress: Progress) -> None:
    rank, world = rank_and_world()
    missing = run.share_missing(variants.count, rank, world)
    for _ in progress(make(variants.count, rank=rank, world=world), run.folder.name, len(missing)):
        pass


def _upscaled(run: ImageRun, count: int, size: tuple[int, int]) -> Iterator[Tensor]:
    for images in run.batches(count):
        if images.shape[-2:] == size:
            yield images
            continue
        yield upscaled(images, size)
