"""The ``davae train`` commands as functions: recipe in, run directory out."""

import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

from davae.bases.open import describe_pipeline, is_built_in, load_base, load_recipe_autoencoder
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.families import ClassFamily, find_family, why_untrainable
from davae.pipelines.saving.opening import LAYERS_FILE, is_model_alone, pipeline_place
from davae.planner.architectures import Architecture, find_architecture
from davae.planner.recipes import dry_run as describe_run
from davae.recipes.checks import check_backbones, check_settings, check_start
from davae.recipes.data import check_data_paths, is_procedural
from davae.recipes.presets import find_preset
from davae.recipes.read import load_recipe
from davae.recipes.settings import BaseRecipe, TuneSettings, UpgradeRecipe
from davae.runtime.processes import LAUNCHER
from davae.training.autoencoder.train import check_levels, train_levels
from davae.training.base.train import check_halves, train_base
from davae.training.base.train import dry_run_base as describe_base_run
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.data import bucket_sizes, check_divides, check_images
from davae.training.diffusion.train import check_transformer, train_transformer
from davae.training.engine.fsdp import asks_for_fsdp
from davae.training.loop.loop import TrainResult, figures_line

logger = logging.getLogger(__name__)


def run_autoencoder(
    recipe: str | Path, overrides: Sequence[str] = (), out: Path | None = None, *, dry_run: bool = False
) -> str:
    """Train stage 1 of a recipe into ``out``, by default ``runs/RECIPE-autoencoder``; returns a summary to print.

    Raises:
        DavaeError: the recipe, the data or the base is wrong, or ``out`` holds another run.
    """
    settings = _upgrade_recipe(recipe, overrides, "autoencoder")
    if dry_run:
        check_upgrade(settings, "autoencoder", without_images=True)
        return describe_run(settings, "autoencoder")
    result = train_autoencoder(settings, out or run_folder(recipe, "autoencoder"))
    return _summary(result)


def run_diffusion(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    *,
    autoencoder: Path | None = None,
    dry_run: bool = False,
) -> str:
    """Train stage 2 of a recipe into ``out``, by default ``runs/RECIPE-diffusion``; returns a summary to print."""
    settings = _upgrade_recipe(recipe, overrides, "diffusion")
    if dry_run:
        check_upgrade(settings, "diffusion", without_images=True)
        return describe_run(settings, "diffusion")
    folder = trained_autoencoder(recipe, autoencoder)
    check_cache_is_there(settings, recipe, overrides, autoencoder)
    result = train_diffusion(settings, out or run_folder(recipe, "diffusion"), folder)
    return _summary(result)


def run_base(
    recipe: str | Path, overrides: Sequence[str] = (), out: Path | None = None, *, dry_run: bool = False
) -> str:
    """Train a base pipeline into ``out``, by default ``runs/RECIPE``; returns a summary to print."""
    settings = load_recipe(recipe, overrides)
    if not isinstance(settings, BaseRecipe):
        raise DavaeError(f"recipe '{recipe}' upgrades a base; `davae train base` needs one of kind: base")
    for section in ("autoencoder", "transformer"):
        check_settings(settings, section)
        if not dry_run:
            check_backbones(settings, section)
    if not dry_run:
        check_cache_is_there(settings, recipe, overrides)
    start, folder = settings.start_from, out or run_folder(recipe)
    if not dry_run:
        check_halves(settings, folder)
    if _is_there(settings.data.path) or not dry_run:
        check_images(settings.data)
    if dry_run:
        return describe_base_run(settings)
    base = None if start is None else load_base(start.pipeline)
    return _summary(train_base(settings, folder, base))


def train_autoencoder(recipe: UpgradeRecipe, out: Path) -> TrainResult:
    """Stage 1 into ``out/autoencoder``. Continues from the newest checkpoint in ``out``."""
    check_levels(recipe, out)
    check_upgrade(recipe, "autoencoder")
    check_start(recipe.autoencoder.start_from, "autoencoder.start_from", ("config.json", "autoencoder/config.json"))
    return train_levels(recipe, load_recipe_autoencoder(recipe), out)


def train_diffusion(recipe: UpgradeRecipe, out: Path, autoencoder: Path) -> TrainResult:
    """Stage 2 into ``out/pipeline``. Continues from the newest checkpoint in ``out``."""
    check_transformer(recipe, out, autoencoder)
    check_upgrade(recipe, "diffusion")
    if not checkpoints(out / "checkpoints"):  # a resumed run has its own weights
        places = ("model_index.json", "pipeline/model_index.json", LAYERS_FILE, f"adapters/{LAYERS_FILE}")
        check_start(recipe.diffusion.start_from, "diffusion.start_from", places)
    return train_transformer(recipe, out, autoencoder)


def check_upgrade(recipe: UpgradeRecipe, section: str, *, without_images: bool = False) -> None:
    """Check the settings and images of an upgrade's stage before the base's weights are loaded.

    Args:
        recipe: the whole recipe.
        section: of the stage, ``autoencoder`` or ``diffusion``.
        without_images: whether the images may be absent.

    Raises:
        DavaeError: settings do not fit each other, the base or the images, or images are missing or unusable.
    """
    check_settings(recipe, section)
    if section == "diffusion":
        _check_not_sharded(recipe.diffusion.tune)
    data = recipe.data
    if not without_images:
        check_backbones(recipe, section)
        check_data_paths(data)
    architecture = _known_architecture(recipe.base)
    captions_for, pipeline = None, None
    if architecture is not None:
        pipeline = (architecture.pipeline, architecture.transformer) if architecture.transformer else None
    elif not without_images:  # a dry run downloads nothing
        pipeline = describe_pipeline(recipe.base, recipe.base_revision)
    if pipeline is not None and (why := why_untrainable(*pipeline)) is not None:
        if section == "diffusion":
            raise why
        if not without_images:
            logger.warning("stage 2 cannot follow this training: %s", why)
    if architecture is not None:
        side = recipe.autoencoder.model.scale * _compression(architecture)
        if section == "diffusion":
            architecture.require_transformer()
            family = find_family(architecture.pipeline)
            side *= architecture.patch
            captions_for = architecture.pipeline if family.conditioned_on == "text" else None
            family.check_length(recipe.diffusion.prompts.max_length)
            if isinstance(family, ClassFamily):
                family.check_interval(recipe.diffusion.sample.guidance_interval)
        for resolution in data.resolutions:
            check_divides(resolution, side)
        bucket_sizes(data, side)
    if _is_there(data.path) or not without_images:
        check_images(data, captions_for=captions_for)


def _check_not_sharded(tune: TuneSettings) -> None:
    """Refuse FSDP where frozen weights are quantised or rest in main memory."""
    quantized = tune.quantization != "none"
    if (quantized or tune.offload_blocks) and asks_for_fsdp():
        key, off = ("quantization", "none") if quantized else ("offload_blocks", "false")
        raise DavaeError(
            f"diffusion.tune.{key} does not work with FSDP, which {LAUNCHER} asks for: set diffusion.tune.{key}={off}, "
            "or use a configuration without FSDP, such as configs/accelerate/eight-gpus.yaml "
            "(`davae configs` writes it)"
        )


def _is_there(path: str) -> bool:
    return is_procedural(path) or Path(path).expanduser().exists()


def _known_architecture(base: str) -> Architecture | None:
    """The architecture of a base whose configuration is on this machine; ``None`` if it would have to be downloaded."""
    if is_built_in(base) or find_preset(base) is not None:
        return find_architecture(base)
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return None
    return find_architecture(folder if is_model_alone(folder) else pipeline_place(folder))


def _compression(architecture: Architecture) -> int:
    vae = architecture.build_vae()
    return vae.spatial_compression if isinstance(vae, AutoencoderDA) else architecture.base_compression


def _upgrade_recipe(recipe: str | Path, overrides: Sequence[str], section: str) -> UpgradeRecipe:
    settings = load_recipe(recipe, overrides, stage=section)
    if not isinstance(settings, UpgradeRecipe):
        raise DavaeError(
            f"recipe '{recipe}' is of kind '{settings.kind}': use `davae train {settings.kind} --recipe {recipe}`"
        )
    return settings


def trained_autoencoder(recipe: str | Path, given: Path | None) -> Path:
    """The folder of a recipe's trained autoencoder: the given one, else the default of stage 1.

    Raises:
        DavaeError: the folder does not exist.
    """
    folder = given or run_folder(recipe, "autoencoder") / "autoencoder"
    if not folder.is_dir():
        raise DavaeError(
            f"no trained autoencoder in {folder}: run `davae train autoencoder --recipe {recipe}` first, "
            "or name one with --autoencoder"
        )
    return folder


def run_folder(recipe: str | Path, stage: str = "") -> Path:
    """The default run directory of a recipe: ``runs/RECIPE-STAGE``, or ``runs/RECIPE`` without a stage."""
    return Path("runs") / (f"{Path(recipe).stem}-{stage}" if stage else Path(recipe).stem)


def _summary(result: TrainResult) -> str:
    figures = figures_line(result.metrics)
    return f"{result.result}\n{figures}"


def cache_folder(settings: UpgradeRecipe | BaseRecipe, recipe: str | Path) -> Path:
    """The folder of a recipe's cache: its ``data.cache``, else ``caches/RECIPE``."""
    return Path(settings.data.cache or Path("caches") / Path(recipe).stem)


def training_command(
    settings: UpgradeRecipe | BaseRecipe,
    recipe: str | Path,
    overrides: Sequence[str],
    autoencoder: Path | None,
    folder: Path,
) -> str:
    """The command that trains from the cache in ``folder``.

    Args:
        settings: the resolved recipe.
        recipe, overrides, autoencoder: as given to ``davae cache``.
        folder: of the cache.
    """
    named = settings.data.cache is not None and Path(settings.data.cache) == folder
    more = [] if named else [f"data.cache={folder}"]
    verb = ["train", "diffusion" if isinstance(settings, UpgradeRecipe) else "base"]
    return _command(verb, recipe, [*overrides, *more], autoencoder)


def check_cache_is_there(
    settings: UpgradeRecipe | BaseRecipe,
    recipe: str | Path,
    overrides: Sequence[str] = (),
    autoencoder: Path | None = None,
) -> None:
    """Check, before a base is loaded, that the cache to train from exists.

    Args:
        settings: the resolved recipe.
        recipe, overrides, autoencoder: as given to ``davae train``.

    Raises:
        DavaeError: ``data.cache`` names a folder without a cache; the message has the command that writes it.
    """
    folder = settings.data.cache
    if folder is None or (Path(folder) / "fingerprint.json").is_file():
        return
    raise DavaeError(
        f"there is no cache of latents in {folder}, which recipe '{recipe}' trains from (data.cache): run "
        f"`{_command(['cache'], recipe, overrides, autoencoder)}` first, or train from the images themselves with "
        "data.cache=null"
    )


def _command(verb: Sequence[str], recipe: str | Path, overrides: Sequence[str], autoencoder: Path | None) -> str:
    options = [] if autoencoder is None else ["--autoencoder", str(autoencoder)]
    return shlex.join(["davae", *verb, "--recipe", str(recipe), *options, *overrides])
