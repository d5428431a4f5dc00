"""Stage 1 of an upgrade: one training, or one per level if the details have sequential levels."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from davae.bases.open import EVERYTHING, is_pipeline, load_recipe_base
from davae.errors import DavaeError, named
from davae.models import AutoencoderDA
from davae.pipelines.saving.opening import load_autoencoder
from davae.pipelines.upgrade import layout_over
from davae.recipes.settings import AutoencoderModelSettings, AutoencoderSettings, UpgradeRecipe
from davae.runtime.processes import loader_workers
from davae.training.autoencoder.fit import fit_levels
from davae.training.autoencoder.stage import AutoencoderStage
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.checkpoints.foundations import model_hash
from davae.training.checkpoints.run_directory import RunDirectory, base_facts, data_facts
from davae.training.data import open_part, open_training_part
from davae.training.loop.loop import TrainResult, train

logger = logging.getLogger(__name__)


def train_levels(recipe: UpgradeRecipe, base_vae: Any, out: Path) -> TrainResult:
    """Train the autoencoder of a recipe into ``out/autoencoder``; an interrupted training continues.

    Sequential levels are trained in ``out/level-1``, ``out/level-2``, ..., and the last one in ``out``, each on the
    frozen result of the level below (averaged weights, with their statistics).

    Args:
        recipe: the whole recipe.
        base_vae: the autoencoder of the base.
        out: the run directory.

    Raises:
        DavaeError: the levels or ``start_from`` do not fit the recipe or the base, or ``out`` holds another run.
    """
    model, together = recipe.autoencoder.model, recipe.autoencoder.levels == "together"
    channels = _channels(model)
    below = len(base_vae.levels) - 1 if isinstance(base_vae, AutoencoderDA) else 0
    if below and together:
        raise DavaeError(
            "autoencoder.levels=together would change the levels that the base pipeline was tuned on: use sequential"
        )
    weights = {"the base autoencoder": model_hash(base_vae)}
    torch.manual_seed(recipe.autoencoder.loop.seed)
    vae = _start(recipe.autoencoder, base_vae)
    if vae is not None:
        weights["the autoencoder that it starts from"] = model_hash(vae)
    done = 0 if vae is None else len(vae.levels) - 1 - below
    new = []  # numbers of the levels that the next training starts
    for number in range(done + 1, len(channels) + 1):
        vae = new_level(base_vae if vae is None else vae, model, channels[number - 1])
        new.append(below + number)
        if number < len(channels) and not together:
            folder = out / f"level-{below + number}"
            following = out / f"level-{below + number + 1}" if number + 1 < len(channels) else out
            if not (checkpoints(following / "checkpoints") and (folder / "autoencoder" / "config.json").is_file()):
                logger.info("level %d of %d", below + number, below + len(channels))
                _train(recipe, base_vae, vae, folder, dict(weights), new)
            # else the next level has started from it: it is not trained further
            vae = load_autoencoder(folder / "autoencoder")
            weights["the levels below"] = model_hash(vae)
            new = []
            torch.manual_seed(recipe.autoencoder.loop.seed)
    assert vae is not None
    return _train(recipe, base_vae, vae, out, weights, new)


def check_levels(recipe: UpgradeRecipe, out: Path) -> None:
    """Refuse, before images and weights are opened, a run of other settings in ``out``, or of a level that goes on."""
    plain, others = recipe.model_dump(mode="json"), AutoencoderStage.other_sections
    if not RunDirectory(out, plain, other_sections=others).config.is_file():
        for folder in (config.parent for config in out.glob("level-[0-9]/config.yaml")):
            RunDirectory(folder, plain | {"level": int(folder.name[-1])}, other_sections=others)


def new_level(base: Any, model: AutoencoderModelSettings, detail_channels: int) -> AutoencoderDA:
    """Add one level to ``base``, a VAE or an :class:`AutoencoderDA`, with the recipe's options."""
    options = model.model_dump(exclude={"scale", "detail_channels"})
    factor = 2 if isinstance(model.detail_channels, list) else model.scale
    return AutoencoderDA.from_base(base, scale=factor, detail_channels=detail_channels, **options)


def _channels(model: AutoencoderModelSettings) -> list[int]:
    """Detail channels that each level adds, lowest first."""
    return model.detail_channels if isinstance(model.detail_channels, list) else [model.detail_channels]


def _start(settings: AutoencoderSettings, base_vae: Any) -> AutoencoderDA | None:
    """The autoencoder of ``start_from``, or ``None``; its levels must be the first ones of the recipe."""
    start, model = settings.start_from, settings.model
    if start is None:
        return None
    inside = Path(start) / "autoencoder"
    with named("autoencoder.start_from"):
        vae = load_autoencoder(inside if inside.is_dir() else start)
        layout_over(base_vae, vae)  # raises if the base is another one
    levels = len(base_vae.levels) - 1 if isinstance(base_vae, AutoencoderDA) else 0
    found = [level.own_layout.detail_channels for level in vae.autoencoders()][levels:]
    wanted = _channels(model)
    factor = 2 if isinstance(model.detail_channels, list) else model.scale
    if found != wanted[: len(found)] or vae.factor != factor:
        raise DavaeError(
            f"autoencoder.start_from: the levels of {start} add {found} detail channels, the last "
            f"one at a factor of {vae.factor}; the recipe asks for {wanted} at a factor of {factor}"
        )
    return vae


def _train(
    recipe: UpgradeRecipe,
    base_vae: Any,
    vae: AutoencoderDA,
    out: Path,
    weights: Mapping[str, str],
    new: Sequence[int],
) -> TrainResult:
    """One training, at the resolution of the last level of ``vae``.

    Args:
        recipe, base_vae, vae, out: what to train, and where.
        weights: hashes of what it starts from.
        new: numbers of the levels that nothing has trained yet.
    """
    data = recipe.data
    ratio = recipe.autoencoder.model.scale * getattr(base_vae, "scale", 1) // vae.scale
    if ratio > 1:
        if any(side % ratio for side in data.resolutions) or isinstance(data.buckets, list):
            raise DavaeError(
                f"data: level {len(vae.levels) - 1} is trained at 1/{ratio} of the resolution, which needs a "
                f"data.resolution that is a multiple of {ratio} (in data.more too) and no list of data.buckets"
            )
        data = data.reduced(ratio)
    outline = None
    if not data.of_one_size and is_pipeline(recipe.base, recipe.base_revision):
        outline = load_recipe_base(recipe, without=EVERYTHING)
    train_set, held_out = open_training_part(data, vae, outline), open_part(data, "held_out")
    workers = loader_workers(data.workers)
    if recipe.autoencoder.model.start == "fitted" and not checkpoints(out / "checkpoints"):
        fit_levels(vae, new, recipe.autoencoder, train_set, workers=workers, timeout_s=data.timeout_s)
    stage = AutoencoderStage(
        vae,
        recipe.autoencoder,
        train_set,
        held_out,
        workers=workers,
        timeout_s=data.timeout_s,
        cache_latents=data.cache_latents,
    )
    stage.foundations = {**stage.foundations, **weights}
    stage.facts = base_facts(recipe, base_vae) | data_facts(data, train_set)
    plain = recipe.model_dump(mode="json") | ({"level": len(vae.levels) - 1} if ratio > 1 else {})
    result = train(stage, out, plain)
    assert result is not None
    return result
