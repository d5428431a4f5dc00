"""The images of an upgraded pipeline and of its baselines, from the same prompts and seeds."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import Tensor

from davae.data.cache import value_hash
from davae.errors import DavaeError
from davae.evaluation.generation.compare import Batches
from davae.evaluation.generation.image_run import ImageRun, RunSettings, contents_hash
from davae.evaluation.generation.prompts import GENEVAL_SAMPLES, PromptSet, class_set, open_prompt_set
from davae.pipelines.sampling.generate import takes_prompts
from davae.runtime.pictures import upscaled
from davae.runtime.places import safe_name
from davae.runtime.processes import rank_and_world, wait_for_everyone

UPGRADED, BASE_UPSCALED, BASE_NATIVE = "upgraded", "base, upscaled", "base, native"
CLASS_IMAGES = 50_000
"""Default number of images of a class-conditional model, as in published distances."""


Progress = Callable[[Iterable[int], str, int], Iterable[int]]
"""Wraps the iterator over image numbers; called with it, the name of the variant, and the number of missing images."""


@dataclass
class Variants:
    """Runs by folder name, models by the name they are reported under, and reasons for unavailable baselines."""

    prompts: PromptSet
    count: int
    runs: dict[str, ImageRun] = field(default_factory=dict)
    models: dict[str, Batches] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


def generate_variants(
    open_pipeline: Callable[[str], DiffusionPipeline],
    settings: RunSettings,
    out: str | Path,
    *,
    base: str | None = None,
    others: Mapping[str, str] | None = None,
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
        out: gets a folder each for ``upgraded``, ``base`` (at base resolution), ``native`` (at full) and the others.
        base: name of the base pipeline; ``None`` for no baselines.
        others: further pipelines by the name they are reported under, such as one with as many tokens but another
            autoencoder; they generate at full resolution, or are resized to it.
        prompts: file of prompts, for pipelines that take them.
        captions: called for prompts if there is no such file.
        count: images of each; by default one per prompt (GenEval: four), or 50,000 for classes.
        progress: displays the progress of this process.

    Raises:
        DavaeError: prompts for a class-conditional pipeline or none for the other kind, a folder of another run, or
            two models with one name.
    """
    out = Path(out)
    _check_names(others or {})
    pipe = open_pipeline(settings.pipeline)
    subjects = find_subjects(pipe, prompts, captions)
    total = _count(count, subjects)
    variants = Variants(subjects, total)
    settings = replace(settings, prompts=subjects.describe())
    upgraded = variants.runs["upgraded"] = _make(pipe, settings, out / "upgraded", variants, progress)
    variants.models[UPGRADED] = partial(upgraded.batches, total)
    scale = int(getattr(pipe.vae, "scale", 1))
    wait_for_everyone()
    del pipe  # its memory may be needed
    full = (upgraded.size()[0], upgraded.size()[1])
    if base is not None:
        _add_base(open_pipeline(base), base, settings, out, variants, progress, full, scale)
    for name, pipeline in (others or {}).items():
        pipe = open_pipeline(pipeline)
        sized = replace(settings, pipeline=pipeline)
        if _takes_size(pipe):
            sized = replace(sized, height=full[0], width=full[1])
        run = variants.runs[name] = _make(pipe, sized, out / safe_name(name), variants, progress)
        variants.models[name] = partial(_upscaled, run, total, full)
        wait_for_everyone()
    return variants


def _add_base(
    pipe: DiffusionPipeline,
    base: str,
    settings: RunSettings,
    out: Path,
    variants: Variants,
    progress: Progress,
    full: tuple[int, int],
    scale: int,
) -> None:
    """The base at base resolution, enlarged (equal tokens), and at full resolution."""
    total, flexible = variants.count, _takes_size(pipe)
    height, width = (full[0] // scale, full[1] // scale) if flexible else (None, None)
    small = replace(settings, pipeline=base, height=height, width=width)
    lower = variants.runs["base"] = _make(pipe, small, out / "base", variants, progress)
    variants.models[BASE_UPSCALED] = partial(_upscaled, lower, total, full)
    if scale == 1:
        variants.unavailable[BASE_NATIVE] = "the pipeline is not upgraded: it is native itself"
    elif flexible:
        large = replace(settings, pipeline=base, height=full[0], width=full[1])
        native = variants.runs["native"] = _make(pipe, large, out / "native", variants, progress)
        variants.models[BASE_NATIVE] = partial(native.batches, total)
    else:
        variants.unavailable[BASE_NATIVE] = f"{type(pipe).__name__} takes no height and width"
    wait_for_everyone()


def _takes_size(pipe: DiffusionPipeline) -> bool:
    return "height" in inspect.signature(type(pipe).__call__).parameters


def _check_names(others: Mapping[str, str]) -> None:
    taken = {"upgraded", "base", "native", "geneval", BASE_UPSCALED, BASE_NATIVE}
    for name in others:
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
    rank, world = rank_and_world()
    missing = run.share_missing(variants.count, rank, world)
    made = run.make(pipe, variants.prompts, variants.count, rank=rank, world=world)
    for _ in progress(made, folder.name, len(missing)):
        pass
    return run


def _upscaled(run: ImageRun, count: int, size: tuple[int, int]) -> Iterator[Tensor]:
    for images in run.batches(count):
        if images.shape[-2:] == size:
            yield images
            continue
        yield upscaled(images, size)
