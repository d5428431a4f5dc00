"""``davae generate`` as a function."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from diffusers import DiffusionPipeline

from davae.bases.open import load_base
from davae.choices import Offload, check_choice
from davae.errors import DavaeError
from davae.pipelines import speed_up
from davae.pipelines.families import find_family
from davae.pipelines.sampling.generate import classes_of, generate_images, read_prompts, takes_prompts
from davae.runtime.console import track
from davae.runtime.devices import chosen_device, wanted_dtype
from davae.runtime.pictures import save_image
from davae.runtime.places import check_place, claim
from davae.runtime.text_files import whole_text


class WrittenImages(NamedTuple):
    """The files in the order of their seeds, and the size of the last one in pixels."""

    files: list[Path]
    width: int
    height: int


def write_images(
    pipeline: str,
    labels: Sequence[str] = (),
    *,
    prompt: Sequence[str] = (),
    prompts: Path | None = None,
    out: str | Path = "samples",
    seed: int = 0,
    count: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    negative: str | None = None,
    height: int | None = None,
    width: int | None = None,
    fast: bool = False,
    compile: bool = False,
    attention: str | None = None,
    offload: Offload | None = None,
    device: str | None = None,
    dtype: str | None = None,
    variant: str | None = None,
) -> WrittenImages:
    """Generate images of prompts or classes, one PNG each.

    Args:
        pipeline: a pipeline's folder or a run, ``tiny`` or ``tiny-upgraded``, or a name on the hub.
        labels: class names or numbers, of a class-conditional pipeline.
        prompt: prompts, of a text-to-image pipeline.
        prompts: a text file of more prompts, one per line.
        out: folder for the images: new, empty, or one of generated images.
        count: images of each.
        seed, steps, guidance, height, width: see :func:`davae.pipelines.sampling.generate.generate_images`.
        negative: a prompt to guide away from.
        fast: all optimisations that change images only by rounding, see :func:`davae.speed_up`.
        compile, attention: see :func:`davae.speed_up`; with ``fast`` only.
        offload: weights in main memory, on the GPU only those of the model (``model``) or layer (``sequential``) that
            computes, and images decoded in tiles: less GPU memory, more time. Images change by rounding, and where
            tiles meet.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the GPU, if any.
        variant: of the weights' files, see :func:`davae.bases.open.load_base`.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default as saved.

    Raises:
        DavaeError: the pipeline cannot be opened or does not take these arguments, or ``out`` holds something else.
    """
    if (compile or attention) and not fast:
        raise DavaeError("--compile and --attention belong to --fast: give it too")
    where = chosen_device(device)
    if offload is not None:
        check_choice(offload, Offload, "--offload")
        if where == "cpu":
            raise DavaeError(
                f"--offload {offload} moves weights to a GPU as they are needed: here is none, leave it out"
            )
        if fast:
            raise DavaeError("--fast needs the weights on the GPU: leave out --offload, or --fast")
    check_place(out, "images")
    texts = [*map(whole_text, prompt), *(read_prompts(prompts) if prompts else [])]
    pipe = load_base(pipeline, variant=variant, dtype=wanted_dtype(dtype))
    if offload is None:
        pipe.to(where)
    else:
        offload_weights(pipe, offload, where)
    if fast:  # its measures follow from the device
        speed_up(pipe, compile=compile, attention=attention)
    pipe.set_progress_bar_config(disable=True)
    subjects = _subjects(pipe, labels, texts)
    family = find_family(type(pipe).__name__)
    if texts and family is not None:
        family.tell_cut_prompts(pipe, texts)
    images = generate_images(
        pipe,
        subjects,
        count=count,
        seed=seed,
        steps=steps,
        guidance=guidance,
        negative_prompt=negative and whole_text(negative),
        height=height,
        width=width,
    )
    files = []
    with claim(out, "images") as folder:  # removed again if nothing is written
        for made in track(images, "generating", total=count * len(subjects)):
            save_image(made.image, folder / made.file_name)
            files.append(folder / made.file_name)
    return WrittenImages(files, *made.image.size)


def offload_weights(pipe: DiffusionPipeline, offload: Offload, device: str) -> None:
    """Keep a pipeline's weights in main memory while they rest, see :func:`write_images`."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.enable_sequential_cpu_offload(device=device)
    for saving in ("enable_tiling", "enable_slicing"):
        if hasattr(pipe.vae, saving):
            getattr(pipe.vae, saving)()


def _subjects(pipe: DiffusionPipeline, labels: Sequence[str], texts: Sequence[str]) -> Sequence[str]:
    """The subjects that the pipeline takes: texts or classes."""
    subjects, wrong = (texts, labels) if takes_prompts(pipe) else (labels, texts)
    if wrong or not subjects:
        wanted = "prompts: give --prompt or --prompts" if takes_prompts(pipe) else f"classes: {classes_of(pipe)}"
        raise DavaeError(f"{type(pipe).__name__} makes images of {wanted}")
    return subjects
