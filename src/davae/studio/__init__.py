"""What ``davae studio`` shows, without its page: an upgrade and its base, their pictures, plans, runs as they go."""

import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from davae.bases.open import is_built_in, is_pipeline, load_base
from davae.data import decode_image, open_dataset
from davae.data.images.decode import check_header
from davae.data.images.transforms import resize_to_cover
from davae.errors import DavaeError
from davae.evaluation.images import trained_resolution
from davae.evaluation.metrics import names
from davae.evaluation.reconstruction import baselines
from davae.evaluation.reconstruction.crops import whole_positions
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
from davae.runtime.package_files import TINY, TINY_UPGRADED
from davae.runtime.pictures import as_picture
from davae.runtime.text_files import read_object
from davae.training.checkpoints.run_directory import read_config

MOST_PIXELS = 50_000_000
"""Of an uploaded picture."""
MOST_SIDE = 2048
"""Of what is reconstructed of it."""
ORIGINAL, ENLARGED, ALONE, DETAILS = "Original", "Base, enlarged", "Decoder alone", "With details"
NATIVE, REDUCED = "Base at full size", "Reduced, enlarged"
_ROWS = {
    ENLARGED: names.BASE_ENLARGED,
    ALONE: names.DECODER_ALONE,
    DETAILS: names.UPGRADED,
    NATIVE: names.BASE_NATIVE,
    REDUCED: names.REDUCED,
}
_SCENES = 64  # to which an embedded base's start is fitted
_DEEPEST = 4  # folders between the folder of runs and a run
_INSIDE = {"checkpoints", "samples", "tracking", "pipeline"}  # folders in runs that hold none
_UNTUNED = "Images are the base's own, decoded larger by the decoder alone: no transformer is tuned."


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


def open_models(
    model: str | None,
    runs: Path,
    *,
    base: str | None = None,
    device: str = "cpu",
    dtype: torch.dtype | Literal["saved"] = "saved",
) -> Models:
    """Open an upgrade and its base.

    Args:
        model: an upgraded pipeline, an autoencoder, or a run (folders, or names on the hub), or a base that comes with
            davae, which gets a start that is not trained; by default the newest that a run below ``runs`` has
            finished, else ``tiny-upgraded``.
        runs: folder of runs.
        base: the base pipeline; by default the one that the recipe of the model's run names.
        device: ``cpu``, ``cuda`` or ``cuda:1``.
        dtype: of the weights; ``saved`` is that of the files.

    Raises:
        DavaeError: what is named cannot be opened, or is a base.
    """
    finished = [place for run in find_runs(runs) if model is None and (place := _result(run)) is not None]
    newest = max(finished, key=lambda one: (one.name == "pipeline", one.stat().st_mtime), default=TINY_UPGRADED)
    name = model or str(newest)
    if name == TINY_UPGRADED:
        models = _shipped()
        if model is None:
            models.notes.append(f"No finished run lies below {runs}, so this is the upgrade that comes with davae.")
    elif is_built_in(name):
        models = _untrained(name)
        models.notes.append("`davae demo` trains an upgrade of it.")
    else:
        place = _result(Path(name)) or Path(name)
        if place.is_dir():
            whole = (place / "model_index.json").is_file()
        else:
            whole = is_pipeline(hub_name("pipeline or autoencoder", name))
        pipe = load_base(str(place)) if whole else None
        if pipe is not None and not isinstance(pipe.vae, AutoencoderDA):
            raise DavaeError(f"{name} is a base: upgrade it with `davae upgrade`, or name what was made of it")
        models = Models(name, load_autoencoder(place, dtype=dtype) if pipe is None else pipe.vae, pipe)
        _add_base(models, place, base)
    precision = {} if dtype == "saved" else {"dtype": dtype}
    models.vae.to(device, **precision).eval()
    for opened in (models.pipe, models.base):
        if opened is not None:
            opened.to(device, **precision).set_progress_bar_config(disable=True)
    return models


def _result(run: Path) -> Path | None:
    """The pipeline that lies in a folder, a run or a demo, else the autoencoder; of runs only what is upgraded."""

    def upgraded(folder: Path) -> bool:
        file = folder / "config.json"
        return file.is_file() and read_object(file).get("_class_name") == AutoencoderDA.__name__

    if (run / "model_index.json").is_file() or upgraded(run):
        return run
    places = [place for place in (run / "pipeline", run / "diffusion" / "pipeline") if upgraded(place / "vae")]
    places += [place for place in (run / "autoencoder", run / "autoencoder" / "autoencoder") if upgraded(place)]
    return places[0] if places else None


def _side(pipe: DiffusionPipeline) -> int:
    """Of what a class-conditional pipeline makes, in pixels."""
    return int(pipe.transformer.config.sample_size * pipe.vae_scale_factor)


def _shipped() -> Models:
    """The upgrade that comes with davae, beside its base."""
    pipe = load_base(TINY_UPGRADED)
    return Models(TINY_UPGRADED, pipe.vae, pipe, load_base(TINY), _side(pipe))


def _untrained(name: str) -> Models:
    """An embedded base with new blocks that are fitted to a few scenes in closed form, and nothing trained."""
    base = load_base(name)
    side = 2 * _side(base)
    scenes = open_dataset(f"procedural:{_SCENES}", resolution=side)
    channels = 3 * base.transformer.config.in_channels
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=channels, detail_dropout=0.5)
    fit_start(vae, torch.stack([scenes[i]["image"] for i in range(_SCENES)]))
    told = (
        f"The base '{name}' with new blocks fitted to {_SCENES} scenes, nothing trained: it shows how the page works, "
        "not what the method reaches."
    )
    return Models(name, vae, upgrade_pipeline(base, vae.without_details()), base, side, [told, _UNTUNED])


def _add_base(models: Models, place: Path, base: str | None) -> None:
    """Open the base of an upgrade; an autoencoder alone gets a pipeline that decodes what its base samples."""
    config = place.parent / "config.yaml"
    recipe = (read_config(config) if place.is_dir() and config.is_file() else None) or {}
    if "data" in recipe:
        models.side = trained_resolution(place)
    name = base or str(recipe.get("base", ""))
    if not name:
        models.notes.append("No base is known: name it with --base to compare with it.")
        return
    try:
        if not is_pipeline(name):
            models.notes.append(f"Its base, {name}, is an autoencoder alone: nothing can be generated.")
            return
        opened = load_base(name, without=() if models.pipe is None else (TEXT_ENCODERS,))
        if models.pipe is None:
            models.pipe = upgrade_pipeline(opened, models.vae.without_details(), copy=False)
            models.notes.append(_UNTUNED)
        parts = models.pipe.components.items()
        opened.register_modules(**{part: model for part, model in parts if part.startswith("text_encoder")})
        models.base = opened
    except DavaeError as error:
        if base is not None:
            raise
        models.notes.append(f"Its base cannot be opened, so nothing is compared with it: {error}")


def reconstruct_file(
    models: Models, file: str | Path, side: int
) -> tuple[Image.Image, dict[str, baselines.OneReconstruction]]:
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
    if (factor := side / max(picture.size)) < 1:
        width, height = (max(1, round(length * factor)) for length in picture.size)
        picture = resize_to_cover(picture, (width, height))
    image = whole_positions(picture, models.vae.spatial_compression)
    made = baselines.reconstruct_one(models.vae, image)
    if names.DECODER_ALONE not in made:  # without details the autoencoder is that
        made[names.DECODER_ALONE] = made.pop(names.UPGRADED)
    return as_picture(image[0]), {name: made[row] for name, row in _ROWS.items() if row in made}


@dataclass
class Sample:
    """An image of one pipeline, as far as it is made.

    Attributes:
        name: of the way that it is made.
        pipe: the pipeline.
        compression: pixels of a latent position along a side.
        state: None before it begins.
    """

    name: str
    pipe: DiffusionPipeline
    compression: int
    state: Watched | None = None

    @property
    def tokens(self) -> int | None:
        """Image tokens in the transformer, once the image is there."""
        if self.state is None or self.state.image is None:
            return None
        columns, rows = (length // self.compression for length in self.state.image.size)
        return find_family(self.pipe).tokens(self.pipe.transformer, torch.empty(1, 1, rows, columns, device="meta"))


def sample_side_by_side(
    models: Models,
    subject: str,
    steps: int | None = None,
    guidance: float | None = None,
    width: int | None = None,
    height: int | None = None,
    seed: int = 0,
    native: bool = False,
    *,
    stop: threading.Event | None = None,
) -> Iterator[list[Sample]]:
    """One image from the base and from the upgrade, from the same seed, one after the other; yields after each step.

    Args:
        models: with a pipeline.
        subject: a prompt, or the name or number of a class.
        steps, guidance, seed: see :func:`davae.pipelines.sampling.generate.generate_images`.
        width, height: of the upgrade's image in pixels, and that divided by the scale of the base's.
        native: also the base at full size, last.
        stop: once set, no further step is made.

    Raises:
        DavaeError: there is no pipeline, or it does not take these.
    """
    pipe, base, vae = models.pipe, models.base, models.vae
    if pipe is None:
        raise DavaeError("there is no pipeline to generate with")
    made = Sample(DETAILS if pipe.vae.uses_details else ALONE, pipe, vae.spatial_compression)
    samples = [made]
    if base is not None:
        samples = [Sample(ENLARGED, base, vae.base_compression), made]
        samples += [Sample(NATIVE, base, vae.base_compression)] if native else []
    for sample in samples:
        size = width, height
        if sample.name == ENLARGED:
            size = None if width is None else width // vae.scale, None if height is None else height // vae.scale
        elif sample.name == NATIVE and made.state is not None and made.state.image is not None:
            size = made.state.image.size
        options: dict[str, Any] = {"seed": seed, "steps": steps, "guidance": guidance}
        with closing(watch_image(sample.pipe, subject, width=size[0], height=size[1], **options)) as watched:
            for sample.state in watched:
                if stop is not None and stop.is_set():
                    return
                yield samples


def plan_form(
    runs: Path,
    base: str,
    resolution: int | None = None,
    scale: int | None = None,
    detail_channels: str = "",
    gpu: str = "H100",
    batch: int = 1,
    recipe: str = "",
    overrides: str = "",
    cpu: bool = False,
) -> tuple[Plan, str]:
    """A plan from the fields of a form, and the command that makes the same.

    Args:
        runs: folder of runs.
        base: a bundled configuration, ``tiny``, a name on the hub, or a folder below ``runs``; empty for the recipe's.
        resolution, scale, gpu, batch, cpu: see :func:`davae.planner.recipes.plan_upgrade`.
        detail_channels: numbers, one for each level; empty for those of the official code.
        recipe: name of a bundled recipe; empty for the one that fits.
        overrides: of the recipe, ``section.key=value``, separated by spaces as in a shell.

    Raises:
        DavaeError: as there, or a path that does not lie below ``runs``.
    """
    try:
        given = shlex.split(overrides)
        channels = tuple(map(int, detail_channels.replace(",", " ").split()))
    except ValueError as error:
        raise DavaeError(
            f"overrides are section.key=value, separated by spaces, and detail channels whole numbers: {error}"
        ) from error
    if places := {override.partition("=")[0] for override in given} & movable_keys("upgrade"):
        raise DavaeError(f"{min(places)} names a place, which a plan on this page does not read: leave it out")
    name = base.strip()
    if not is_built_in(name) and find_preset(name) is None and (os.path.exists(name) or (runs / name).exists()):
        name = str(inside(runs, name)) if name else ""  # other names are of the hub
    options: dict[str, Any] = {"resolution": resolution, "scale": scale, "gpu": gpu, "batch": batch or 1}
    options |= {"recipe": recipe or None}
    made = plan_upgrade(name or None, detail_channels=channels or None, overrides=given, cpu=cpu, **options)
    words = ["davae", "plan", *([name] if name else []), *given]
    words += [word for key, value in options.items() if value is not None for word in (f"--{key}", str(value))]
    words += [word for number in channels for word in ("--detail-channels", str(number))]
    return made, shlex.join([*words, *(["--cpu"] if cpu else [])])


def find_runs(runs: Path) -> list[Path]:
    """Folders of training runs below a folder, those written last first; links are not followed."""
    found: dict[Path, float] = {}
    for folder, folders, files in os.walk(runs):
        place = Path(folder)
        deep = len(place.relative_to(runs).parts) >= _DEEPEST
        folders[:] = [] if deep else [name for name in folders if name[0] != "." and name not in _INSIDE]
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
    for part in ("config.yaml", "metrics.jsonl", *(["samples"] if (run / "samples").exists() else [])):
        inside(runs, f"{name}/{part}")
    view = view_run(run)
    return replace(view, sheets=[file for file in view.sheets if not file.is_symlink()])
