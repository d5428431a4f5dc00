"""What ``davae studio`` shows, without its page: an upgrade and its base, their pictures, plans, runs as they go."""

import logging
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from davae.bases.open import is_built_in, is_pipeline, load_base
from davae.data import decode_image, open_dataset
from davae.data.images.decode import check_header
from davae.data.images.transforms import resize_to_cover
from davae.errors import DavaeError
from davae.evaluation.images import trained_resolution
from davae.evaluation.reconstruction.baselines import (
    BASE_NATIVE,
    BASE_UPSCALED,
    REDUCED,
    UPGRADED,
    OneReconstruction,
    reconstruct_one,
)
from davae.evaluation.reconstruction.crops import whole_positions
from davae.evaluation.reconstruction.details import ZEROED
from davae.models import AutoencoderDA, fit_start
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families import find_family
from davae.pipelines.sampling.generate import Watched, watch_image
from davae.pipelines.saving.opening import TEXT_ENCODERS, hub_name, load_autoencoder
from davae.planner.plan import Plan
from davae.planner.recipes import plan_upgrade
from davae.recipes.presets import find_preset
from davae.recipes.read import movable_keys
from davae.report.build import RunView, view_run
from davae.runtime.pictures import as_picture
from davae.runtime.text_files import read_object
from davae.training.checkpoints.run_directory import read_config

logger = logging.getLogger(__name__)

MOST_PIXELS = 50_000_000
"""Of an uploaded picture."""
MOST_SIDE = 2048
"""Of what is reconstructed of it."""
ORIGINAL, ALONE, DETAILS, ENLARGED, NATIVE = (
    "Original", "Decoder alone", "With details", "Base, enlarged", "Base at full size",
)  # fmt: skip
_NAMES = {BASE_UPSCALED: ENLARGED, ZEROED: ALONE, UPGRADED: DETAILS, BASE_NATIVE: NATIVE, REDUCED: "Reduced, enlarged"}
_SCENES = 64  # to which the embedded start is fitted
_DEEPEST = 4  # folders between the folder of runs and a run
_HOW = "`davae demo` trains an upgrade of it"


@dataclass
class Models:
    """What is open.

    Attributes:
        name: of it.
        vae: the autoencoder.
        pipe: the upgraded pipeline; without one nothing is generated.
        base: its base pipeline; without one nothing is compared.
        side: of a picture to reconstruct, unless another is asked for.
        notes: what to know of it, and what is missing.
    """

    name: str
    vae: AutoencoderDA
    pipe: DiffusionPipeline | None = None
    base: DiffusionPipeline | None = None
    side: int = 256
    notes: list[str] = field(default_factory=list)


def open_models(model: str | None, runs: Path, *, base: str | None = None, device: str = "cpu") -> Models:
    """Open an upgrade and its base.

    Args:
        model: an upgraded pipeline, an autoencoder, or a run (folders, or names on the hub), or ``tiny``; by default
            the newest that a run below ``runs`` has finished, else the embedded base with a start that is not trained.
        runs: folder of runs.
        base: the base pipeline; by default the one that the recipe of the model's run names.
        device: ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        DavaeError: what is named cannot be opened, or is a base.
    """
    found = model
    if model is None:
        finished = [place for run in find_runs(runs) if (place := _result(run)) is not None]
        found = str(max(finished, key=lambda place: (place.name == "pipeline", place.stat().st_mtime), default="tiny"))
    assert found is not None
    if is_built_in(found):
        models = _untrained(found)
        models.notes.append(f"{_HOW}." if model is not None else f"No finished run lies below {runs}: {_HOW}.")
    else:
        folder = Path(found)
        place = _result(folder) or folder
        models = _pipeline(str(place)) if _holds_pipeline(place) else _autoencoder(place)
        models.name = found
        _add_base(models, place, base)
    for part in (models.vae, models.pipe, models.base):
        if part is not None:
            part.to(device)
    for pipe in (models.pipe, models.base):
        if pipe is not None:
            pipe.set_progress_bar_config(disable=True)
    models.vae.eval()
    return models


def _result(run: Path) -> Path | None:
    """The upgraded pipeline that lies in a folder, a run or a demo, else its autoencoder; None if there is neither."""
    for place in (run, run / "pipeline", run / "diffusion" / "pipeline"):
        if (place / "model_index.json").is_file():
            return place if _class_of(place / "vae") == AutoencoderDA.__name__ or place == run else None
    for place in (run, run / "autoencoder", run / "autoencoder" / "autoencoder"):
        if _class_of(place) == AutoencoderDA.__name__:
            return place
    return None


def _class_of(folder: Path) -> Any:
    file = folder / "config.json"
    return read_object(file).get("_class_name") if file.is_file() else None


def _holds_pipeline(place: Path) -> bool:
    if place.is_dir():
        return (place / "model_index.json").is_file()
    return is_pipeline(hub_name("pipeline or autoencoder", str(place)))


def _untrained(name: str) -> Models:
    """An embedded base with new blocks that are fitted to a few scenes in closed form, and nothing trained."""
    base = load_base(name)
    side = 2 * base.transformer.config.sample_size * base.vae_scale_factor
    channels = 3 * base.transformer.config.in_channels
    scenes = open_dataset(f"procedural:{_SCENES}", resolution=side)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=channels, detail_dropout=0.5)
    fit_start(vae, torch.stack([scenes[i]["image"] for i in range(_SCENES)]))
    told = [
        f"The base '{name}' with new blocks fitted to {_SCENES} scenes, nothing trained: it shows how the page works, "
        "not what the method reaches."
    ]
    return Models(name, vae, upgrade_pipeline(base, vae.without_details()), base, side, [*told, _UNTUNED])


_UNTUNED = "Images are the base's own, decoded larger by the decoder alone: no transformer is tuned."


def _pipeline(place: str) -> Models:
    pipe = load_base(place)
    if not isinstance(pipe.vae, AutoencoderDA):
        raise DavaeError(f"{place} is a base: upgrade it with `davae upgrade`, or name what was made of it")
    return Models(place, pipe.vae, pipe)


def _autoencoder(place: Path) -> Models:
    return Models(str(place), load_autoencoder(place))


def _add_base(models: Models, place: Path, base: str | None) -> None:
    """Open the base of an upgrade, and sample it with the decoder alone where there is an autoencoder only."""
    config = place.parent / "config.yaml"
    recipe = (read_config(config) if place.is_dir() and config.is_file() else None) or {}
    if "data" in recipe:
        models.side = trained_resolution(place)
    name = base or recipe.get("base")
    if not isinstance(name, str):
        models.notes.append("No base is known: name it with --base to compare with it.")
        return
    try:
        if not is_pipeline(name):
            models.notes.append(f"Its base, {name}, is an autoencoder alone: nothing can be generated.")
            return
        pipe = models.pipe
        opened = load_base(name, without=() if pipe is None else (TEXT_ENCODERS,))
        if pipe is None:
            models.pipe = upgrade_pipeline(opened, models.vae.without_details(), copy=False)
            models.notes.append(_UNTUNED)
        else:
            shared = {part: model for part, model in pipe.components.items() if part.startswith("text_encoder")}
            opened.register_modules(**shared)
        models.base = opened
    except DavaeError as error:
        if base is not None:
            raise
        models.notes.append(f"Its base cannot be opened, so nothing is compared with it: {error}")


def reconstruct_file(models: Models, file: str | Path, side: int) -> tuple[Image.Image, dict[str, OneReconstruction]]:
    """A picture, its longer side reduced to ``side`` pixels, and its reconstructions by name.

    Raises:
        DavaeError: no picture, or one that is too large or too small.
    """
    width, height = check_header(file)
    if width * height > MOST_PIXELS:
        raise DavaeError(f"the picture has {width} x {height} pixels, and at most {MOST_PIXELS:,} are taken: reduce it")
    if not 1 <= side <= MOST_SIDE:
        raise DavaeError(f"the longer side must be 1 to {MOST_SIDE} pixels, not {side}")
    picture = decode_image(file)
    factor = side / max(picture.size)
    if factor < 1:
        width, height = (max(1, round(length * factor)) for length in picture.size)
        picture = resize_to_cover(picture, (width, height))
    image = whole_positions(picture, models.vae.spatial_compression)
    made = {_NAMES[name]: one for name, one in reconstruct_one(models.vae, image).items()}
    if ALONE not in made:  # without details the autoencoder is that
        made[ALONE] = made.pop(DETAILS)
    order = [name for name in (ENLARGED, ALONE, DETAILS, NATIVE) if name in made]
    return as_picture(image[0]), {name: made[name] for name in dict.fromkeys([*order, *made])}


@dataclass
class Sample:
    """An image of one pipeline, as far as it is made.

    Attributes:
        name: of the way that it is made.
        pipe: the pipeline.
        compression: pixels of a latent position along a side.
        size: height and width asked for; None for the pipeline's own.
        state: None before it begins.
    """

    name: str
    pipe: DiffusionPipeline
    compression: int
    size: tuple[int | None, int | None]
    state: Watched | None = None

    @property
    def tokens(self) -> int | None:
        """Image tokens in the transformer, once the image is there."""
        if self.state is None or self.state.image is None:
            return None
        width, height = self.state.image.size
        latent = torch.empty(1, 1, height // self.compression, width // self.compression, device="meta")
        return find_family(self.pipe).tokens(self.pipe.transformer, latent)


def sample_side_by_side(
    models: Models,
    subject: str,
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    native: bool = False,
    stop: threading.Event | None = None,
) -> Iterator[list[Sample]]:
    """One image from the base and from the upgrade, from the same seed, one after the other; yields after each step.

    Args:
        models: with a pipeline.
        subject: a prompt, or the name or number of a class.
        seed, steps, guidance: see :func:`davae.pipelines.sampling.generate.generate_images`.
        height, width: of the upgrade's image in pixels, and that divided by the scale of the base's.
        native: also the base at full size.
        stop: once set, no further step is made.

    Raises:
        DavaeError: there is no pipeline, or it does not take these.
    """
    pipe, base, vae = models.pipe, models.base, models.vae
    if pipe is None:
        raise DavaeError("there is no pipeline to generate with")
    name = DETAILS if pipe.vae.uses_details else ALONE
    samples = [Sample(name, pipe, vae.spatial_compression, (height, width))]
    if base is not None:
        small = None if height is None else height // vae.scale, None if width is None else width // vae.scale
        samples.insert(0, Sample(ENLARGED, base, vae.base_compression, small))
        if native:
            samples.append(Sample(NATIVE, base, vae.base_compression, (height, width)))
    for sample in samples:
        rows, columns = sample.size
        if sample.name == NATIVE:  # at the size of the upgrade's image, which is finished
            made = samples[-2].state
            columns, rows = made.image.size if made is not None and made.image is not None else (columns, rows)
        options: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
        with closing(watch_image(sample.pipe, subject, height=rows, width=columns, **options)) as watched:
            for state in watched:
                if stop is not None and stop.is_set():
                    return
                sample.state = state
                yield samples


def plan_form(
    runs: Path,
    base: str,
    *,
    resolution: int | None = None,
    scale: int | None = None,
    detail_channels: str = "",
    gpu: str = "H100",
    batch: int = 1,
    recipe: str | None = None,
    overrides: str = "",
    cpu: bool = False,
) -> tuple[Plan, str]:
    """A plan from the fields of a form, and the command that makes the same.

    Args:
        runs: folder of runs.
        base: a bundled configuration, ``tiny``, a name on the hub, or a folder below ``runs``; empty for the recipe's.
        detail_channels: numbers, one for each level; empty for those of the official code.
        recipe: name of a bundled recipe.
        overrides: of the recipe, ``section.key=value``, separated by spaces as in a shell.
        resolution, scale, gpu, batch, cpu: see :func:`davae.planner.recipes.plan_upgrade`.

    Raises:
        DavaeError: as there, or a path that does not lie below ``runs``.
    """
    given = _words(overrides)
    for override in given:
        if (key := override.partition("=")[0]) in movable_keys("upgrade"):
            raise DavaeError(f"{key} names a place, which a plan on this page does not read: leave it out")
    try:
        channels = tuple(int(number) for number in detail_channels.replace(",", " ").split()) or None
    except ValueError:
        raise DavaeError(f"detail channels are whole numbers, one for each level, not '{detail_channels}'") from None
    name = base.strip() or None
    known = name is None or is_built_in(name) or find_preset(name) is not None
    if name is not None and not known and (os.path.exists(name) or (runs / name).exists()):  # others are of the hub
        name = str(inside(runs, name))
    made = plan_upgrade(
        name,
        resolution=resolution,
        scale=scale,
        detail_channels=channels,
        gpu=gpu,
        batch=batch,
        recipe=recipe,
        overrides=given,
        cpu=cpu,
    )
    options = {"--resolution": resolution, "--scale": scale, "--gpu": gpu, "--batch": batch, "--recipe": recipe}
    words = ["davae", "plan", *([] if name is None else [name]), *given]
    words += [word for option, value in options.items() if value is not None for word in (option, str(value))]
    words += [word for number in channels or () for word in ("--detail-channels", str(number))]
    return made, shlex.join([*words, *(["--cpu"] if cpu else [])])


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise DavaeError(f"overrides are section.key=value, separated by spaces: {error}") from error


def find_runs(runs: Path) -> list[Path]:
    """Folders of training runs below a folder, those written last first; links are not followed."""
    found: dict[Path, float] = {}
    for folder, names, files in os.walk(runs):
        place = Path(folder)
        names[:] = [n for n in names if n[0] != "." and len(place.relative_to(runs).parts) < _DEEPEST]
        if {"config.yaml", "metrics.jsonl"} <= {*files}:
            found[place] = (place / "metrics.jsonl").lstat().st_mtime
    return sorted(found, key=lambda place: -found[place])


def inside(runs: Path, text: str) -> Path:
    """What a page names below the folder of runs.

    Raises:
        DavaeError: it is absolute, climbs out by ``..``, goes through a link, or is not there.
    """
    asked, root = PurePath(text), runs.resolve()
    if asked.is_absolute() or asked.drive or ".." in asked.parts or "\0" in text:
        raise DavaeError(f"'{text}' does not lie below {runs}: give a path inside it")
    place = root / asked
    if os.path.realpath(place) != str(place):
        raise DavaeError(f"'{text}' goes through a link, which may lead out of {runs}: give the place itself")
    if not place.exists():
        raise DavaeError(f"there is no '{text}' below {runs}")
    return place


def watch_run(runs: Path, name: str) -> RunView:
    """A run below the folder of runs, as far as it is; see :func:`davae.report.build.view_run`.

    Raises:
        DavaeError: see :func:`inside`; no run, or damaged metrics.
    """
    run = inside(runs, name)
    for part in ("config.yaml", "metrics.jsonl", "samples"):
        if part != "samples" or (run / part).exists():
            inside(runs, f"{name}/{part}")
    view = view_run(run)
    return replace(view, sheets=[file for file in view.sheets if not file.is_symlink()])
