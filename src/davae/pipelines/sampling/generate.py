"""Images of prompts or classes from any pipeline, each from its own seed; and one that is watched while it is made."""

import inspect
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from davae.errors import DavaeError, first_names
from davae.models import AutoencoderDA
from davae.pipelines.families import ClassFamily, find_family
from davae.pipelines.sampling.previews import Previews
from davae.runtime.console import shown
from davae.runtime.places import safe_name
from davae.runtime.text_files import lines_of, read_text

_NAMED = 20
OnStep = Callable[[int, Any, Tensor], None]
"""Called with a step's number, counted from 0, its timestep and the latents, in the pipeline's form."""


class Generated(NamedTuple):
    """One image, the prompt or class it shows, and its seed."""

    subject: str
    seed: int
    image: Image.Image

    @property
    def file_name(self) -> str:
        """Such as ``a-red-fox-in-snow-7.png``; different subjects give different names."""
        return f"{safe_name(self.subject)}-{self.seed}.png"


def takes_prompts(pipe: DiffusionPipeline) -> bool:
    """Whether the pipeline makes images of prompts; otherwise of classes."""
    return "prompt" in _parameters(pipe)


def classes_of(pipe: DiffusionPipeline) -> str:
    """What to give to a class-conditional pipeline, with the first of its classes' names."""
    numbers: dict[str, int] = getattr(pipe, "labels", None) or {}
    names = sorted(numbers, key=lambda name: numbers[name])
    if not names:
        return "give their numbers"
    return f"give names or numbers of {first_names([shown(name) for name in names], _NAMED)}"


def generate_images(
    pipe: DiffusionPipeline,
    subjects: Sequence[str],
    *,
    count: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    on_step: OnStep | None = None,
) -> Iterator[Generated]:
    """Generate images one after another, each available as soon as it is made.

    Args:
        pipe: text-to-image or class-to-image.
        subjects: prompts, or names or numbers of classes.
        count: images of each subject, at least 1.
        seed: of the first image; it grows by 1 with each further image.
        steps, guidance: the pipeline's own defaults if None. ``guidance`` is ``true_cfg_scale`` for a pipeline that has
            it and a transformer without embedded guidance (Qwen-Image).
        negative_prompt: what to guide away from; if None, a space for pipelines whose guidance needs one.
        height, width: in pixels, full resolution; the pipeline's own defaults if None.
        on_step: called after each step with its number, counted from 0, its timestep and the latents; never by a
            pipeline without a callback (DiT).

    Raises:
        DavaeError: a count below 1, a negative guidance scale, an option that this pipeline does not have, or a class
            or size it does not accept.
    """
    if count < 1:
        raise DavaeError(f"the number of images of each is {count}, but must be at least 1")
    given = _given_options(pipe, steps, guidance, negative_prompt, height, width) | _callback(pipe, on_step)
    for i, subject in enumerate(subject for subject in subjects for _ in range(count)):
        generator = torch.Generator().manual_seed(seed + i)
        made = _call(pipe, **_subject(pipe, subject), **given, generator=generator)
        yield Generated(subject, seed + i, made.images[0])


def generate_batch(
    pipe: DiffusionPipeline,
    subjects: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
) -> list[Image.Image]:
    """Generate images in one call of the pipeline, each from its own seed.

    Args:
        pipe, steps, guidance, negative_prompt, height, width: as for :func:`generate_images`.
        subjects: prompts, or names or numbers of classes.
        seeds: one for each subject.

    Raises:
        DavaeError: as for :func:`generate_images`.
    """
    given = _given_options(pipe, steps, guidance, negative_prompt, height, width)
    if "negative_prompt" in given:
        given["negative_prompt"] = [given["negative_prompt"]] * len(subjects)
    joined: dict[str, list[Any]] = {}
    for subject in subjects:
        for key, value in _subject(pipe, subject).items():
            joined.setdefault(key, []).extend(value if isinstance(value, list) else [value])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return list(_call(pipe, **joined, **given, generator=generators).images)


@dataclass(frozen=True)
class Watched:
    """An image that is being made.

    Attributes:
        step, steps: how many are done, and how many there are.
        seconds: of text encoding, sampling and decoding so far, without previews.
        preview: at base resolution, of an upgraded pipeline whose base has its decoder.
        image: once it is finished.
    """

    step: int
    steps: int
    seconds: float
    preview: Image.Image | None = None
    image: Image.Image | None = None


class _Ended(Exception):
    """Nobody waits for the image any more."""


def watch_image(
    pipe: DiffusionPipeline,
    subject: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
) -> Generator[Watched, None, None]:
    """Generate one image in a thread; yields after each step, and at the end with the image.

    Closing the iterator ends the sampling after the step that is being computed.

    Args:
        pipe, seed, steps, guidance, height, width: as for :func:`generate_images`.
        subject: a prompt, or the name or number of a class.

    Raises:
        DavaeError: as for :func:`generate_images`.
    """
    total = steps or default_of(pipe, "num_inference_steps")
    vae = getattr(pipe, "vae", None)
    previews = None
    if isinstance(vae, AutoencoderDA) and (vae.config.has_base_decoder or getattr(pipe, "preview_decoder", None)):
        previews = Previews(pipe, height=height, width=width)
    said: SimpleQueue[Watched | BaseException] = SimpleQueue()
    ended = threading.Event()
    began, apart = time.perf_counter(), 0.0

    def on_step(step: int, timestep: Any, latents: Tensor) -> None:
        nonlocal apart
        if ended.is_set():
            raise _Ended
        stopped = time.perf_counter()
        elapsed, shown = stopped - began - apart, None
        if previews is not None:
            previews.on_step(step, timestep, latents)
            shown = previews.images[step][0]
        apart += time.perf_counter() - stopped
        said.put(Watched(step + 1, total, elapsed, shown))

    def sample() -> None:
        options: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
        try:
            made = next(generate_images(pipe, [subject], height=height, width=width, on_step=on_step, **options))
            said.put(Watched(total, total, time.perf_counter() - began - apart, image=made.image))
        except BaseException as error:  # noqa: BLE001  it is raised where the image is waited for
            said.put(error)

    thread = threading.Thread(target=sample, name="sampling", daemon=True)
    thread.start()
    try:
        while True:
            found = said.get()
            if isinstance(found, BaseException):
                raise found
            yield found
            if found.image is not None:
                return
    finally:
        ended.set()
        thread.join()


def default_of(pipe: DiffusionPipeline, option: str) -> Any:
    """The default of an argument of the pipeline's call; None if it has no such argument."""
    known = _parameters(pipe).get(option)
    return None if known is None or known.default is inspect.Parameter.empty else known.default


def read_prompts(file: str | Path) -> list[str]:
    """Prompts of a text file, one per line; empty lines and lines that begin with # are skipped.

    Raises:
        DavaeError: the file cannot be read or contains no prompt.
    """
    try:
        lines = lines_of(read_text(file))
    except (OSError, DavaeError) as error:
        raise DavaeError(f"cannot read the prompts in {file}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise DavaeError(f"{file} contains no prompt: write one per line")
    return prompts


def _call(pipe: DiffusionPipeline, **arguments: Any) -> Any:
    """The pipeline's result; a ``ValueError`` of diffusers' own checks of sizes and texts becomes a DavaeError."""
    try:
        return pipe(**arguments)
    except DavaeError:
        raise
    except ValueError as error:
        raise DavaeError(f"{type(pipe).__name__}: {' '.join(str(error).split())}") from error


def _parameters(pipe: DiffusionPipeline) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipe).__call__).parameters)


def _given_options(
    pipe: DiffusionPipeline,
    steps: int | None,
    guidance: float | None,
    negative_prompt: str | None,
    height: int | None,
    width: int | None,
) -> dict[str, Any]:
    """Arguments of the call, without those that keep the pipeline's defaults."""
    if guidance is not None and not 0 <= guidance < math.inf:
        raise DavaeError(f"the guidance scale is {guidance}, but must be at least 0: 1 is none")
    options: dict[str, Any] = {"num_inference_steps": steps, "height": height, "width": width}
    options |= _guidance(pipe, guidance, negative_prompt)
    if "use_resolution_binning" in _parameters(pipe):
        options["use_resolution_binning"] = False  # its listed sizes are the base's
    given = {key: value for key, value in options.items() if value is not None}
    missing = sorted(given.keys() - _parameters(pipe).keys())
    if missing:
        raise DavaeError(f"{type(pipe).__name__} has no option {', '.join(missing)}: leave it out")
    return given


def _callback(pipe: DiffusionPipeline, on_step: OnStep | None) -> dict[str, Any]:
    """The argument by which a pipeline calls ``on_step``, in the new or in the older form (PixArt)."""
    if on_step is None:
        return {}

    def at_the_end(_pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step, timestep, tensors["latents"])
        return {}

    forms: dict[str, Any] = {"callback_on_step_end": at_the_end, "callback": on_step}
    return next(({name: form} for name, form in forms.items() if name in _parameters(pipe)), {})


def _guidance(pipe: DiffusionPipeline, scale: float | None, negative: str | None) -> dict[str, Any]:
    known = _parameters(pipe)
    # "guidance_scale" is for a transformer with embedded guidance; without one it may be ignored.
    embeds_guidance = getattr(pipe.transformer.config, "guidance_embeds", None)
    if scale is not None and "true_cfg_scale" in known and embeds_guidance is False:
        empty = " " if scale > 1 else None  # these pipelines guide only with a negative prompt
        return {"true_cfg_scale": scale, "negative_prompt": negative if negative is not None else empty}
    return {"guidance_scale": scale, "negative_prompt": negative}


def _subject(pipe: DiffusionPipeline, subject: str) -> dict[str, Any]:
    if takes_prompts(pipe):
        return {"prompt": subject}
    if "class_labels" not in _parameters(pipe):
        raise DavaeError(f"{type(pipe).__name__} takes neither prompts nor classes")
    if subject.isdecimal():
        return {"class_labels": [_number(pipe, int(subject))]}
    labels, family = getattr(pipe, "labels", {}), find_family(pipe)
    if subject not in labels and not (isinstance(family, ClassFamily) and family.takes_names):
        raise DavaeError(f"the pipeline has no class '{subject}': {classes_of(pipe)}")
    return {"class_labels": [labels.get(subject, subject)]}


def _number(pipe: DiffusionPipeline, number: int) -> int:
    # Without this check, diffusers' DiTPipeline fails inside an embedding.
    none = getattr(pipe.transformer.config, "num_embeds_ada_norm", None)
    if none is not None and number > none:
        raise DavaeError(f"class {number} is out of range: the model knows 0 to {none - 1}, and {none} for no class")
    return number
