"""Stage 2 of an upgrade: the base pipeline, widened to the trained autoencoder's latents, is tuned on them."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin

from davae.bases.open import TEXT_ENCODERS, load_recipe_base
from davae.bases.upgrade import write_text_encoders
from davae.data import ItemDataset
from davae.data.cache import weights_hash
from davae.errors import DavaeError, named
from davae.latents import LatentLayout
from davae.models import AutoencoderDA
from davae.models.lightningdit import restarted
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families import family_of, find_family
from davae.pipelines.saving.opening import FURTHER_TRANSFORMERS, load_autoencoder
from davae.pipelines.upgrade import layout_over, scheduler_for
from davae.recipes.settings import DiffusionSettings, UpgradeRecipe
from davae.runtime.processes import loader_workers
from davae.training.cache.fingerprint import pipeline_parts
from davae.training.cache.write import open_cache
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.checkpoints.foundations import model_hash
from davae.training.checkpoints.run_directory import RunDirectory, base_facts, data_facts
from davae.training.data import open_part, open_training_part
from davae.training.diffusion.inputs import Inputs, details_seed_of, prepare_inputs
from davae.training.diffusion.objective import channel_prefixes
from davae.training.diffusion.stage import DiffusionStage
from davae.training.diffusion.tuning import started_from
from davae.training.loop.loop import TrainResult, train
from davae.warm_start import widen_channels

_TRANSFORMER = "the base's transformer"


def check_transformer(recipe: UpgradeRecipe, out: Path, autoencoder: Path) -> None:
    """Refuse, before images and weights are opened, a run of other settings in ``out``."""
    plain = recipe.model_dump(mode="json") | {"autoencoder_folder": str(autoencoder)}
    RunDirectory(out, plain, other_sections=DiffusionStage.other_sections)


def train_transformer(recipe: UpgradeRecipe, out: Path, autoencoder: Path) -> TrainResult:
    """Train the transformer of a recipe into ``out/pipeline``; continues from the newest checkpoint in ``out``.

    The base's parts are in memory one after another: text encoders until captions are encoded, then the transformer,
    whose weights the widened one takes over.

    Args:
        recipe: the whole recipe.
        out: the run directory.
        autoencoder: folder of the trained autoencoder, a result of stage 1 on the same base.

    Raises:
        DavaeError: the autoencoder was made from another base, or ``out`` holds another run.
    """
    settings, data = recipe.diffusion, recipe.data
    vae = load_autoencoder(autoencoder)
    channel_prefixes(settings.loss, vae.layout.channels)  # refused before anything is encoded
    held_out = open_part(data, "held_out")
    inputs, weights = _inputs(recipe, vae, held_out)
    base = _open_base(recipe)
    weights |= {_TRANSFORMER: weights_hash(base.transformer)}
    pipeline = upgrade_pipeline(base, vae, copy=False)
    if settings.start_from is not None and not checkpoints(out / "checkpoints"):
        with named("diffusion.start_from"):
            pipeline = started_from(settings.start_from, pipeline, base, settings.tune.mode)
    set_sampling_shift(pipeline, settings)
    torch.manual_seed(settings.loop.seed)
    facts = base_facts(recipe, *base.components.values()) | data_facts(data, held_out)
    layout = layout_over(base.vae, vae)
    stage = DiffusionStage(
        pipeline,
        layout,
        settings,
        inputs,
        before=base,
        reopen=lambda: _widened_again(recipe, layout, weights[_TRANSFORMER]),
        finish=lambda folder: write_text_encoders(recipe, folder),
    )
    stage.foundations = weights
    stage.facts = facts
    del base, pipeline
    result = train(stage, out, recipe.model_dump(mode="json") | {"autoencoder_folder": str(autoencoder)})
    assert result is not None
    return result


def _open_base(recipe: UpgradeRecipe, *without: str) -> DiffusionPipeline:
    """The base without its text encoders, as it is tuned."""
    tune = recipe.diffusion.tune
    dtype = getattr(torch, tune.frozen_dtype)
    left = (TEXT_ENCODERS, FURTHER_TRANSFORMERS, *without)
    base = load_recipe_base(recipe, without=left, transformer_dtype=dtype)
    if tune.add_qk_norm:
        base.transformer = restarted(base.transformer, qk_norm=True)
    find_family(base).join_parts(base)
    return base


def _widened_again(recipe: UpgradeRecipe, layout: LatentLayout, expected: str) -> ModelMixin:
    """The base's transformer, opened anew and widened.

    Args:
        recipe: names the base.
        layout: its channels, and those of the details.
        expected: hash of the base's weights when training began.

    Raises:
        DavaeError: the base has other weights now.
    """
    transformer = _open_base(recipe, "vae").transformer
    if weights_hash(transformer) != expected:
        raise DavaeError(
            f"base {recipe.base} has other weights than when training began, so that the result cannot be written. "
            "What was trained is saved: put the base back (a name on the hub: base_revision=... of the run's "
            "environment.json), and run the same command again"
        )
    channels = {"base_channels": layout.base_channels, "detail_channels": layout.detail_channels}
    return widen_channels(transformer, **channels, copy=False)


def set_sampling_shift(pipeline: DiffusionPipeline, settings: DiffusionSettings) -> None:
    """Give the pipeline the timestep shift of ``sampling_shift``, else the one that it is trained with, if set.

    Raises:
        DavaeError: a shift is set, but the pipeline samples without one.
    """
    noise = settings.timesteps
    asked = {
        "sampling_shift": settings.sampling_shift,
        "timesteps.table.train_shift": noise.table and noise.table.train_shift,
        "timesteps.shift": noise.shift,
    }
    key, shift = next(((key, value) for key, value in asked.items() if value), ("", None))
    if shift is None or (key != "sampling_shift" and family_of(pipeline).kind != "flow"):
        return
    channels = pipeline.vae.layout.base_channels, pipeline.vae.layout.channels
    try:
        scheduler = scheduler_for(pipeline, shift, scale=pipeline.vae.scale, channels=channels)
    except DavaeError as error:
        raise DavaeError(
            f"diffusion.{key}={shift:g}: {type(pipeline).__name__} samples without a timestep shift; leave it out"
        ) from error
    pipeline.register_modules(scheduler=scheduler)


def _inputs(recipe: UpgradeRecipe, vae: AutoencoderDA, held_out: ItemDataset) -> tuple[Inputs, dict[str, str]]:
    """The stage's inputs, and hashes of the weights that encoded them."""
    data = recipe.data
    encoders = load_recipe_base(recipe, without=("vae", "transformer"))
    weights = {"the autoencoder": model_hash(vae)}
    if data.cache:  # which has hashes of its own
        train_set: ItemDataset = open_cache(
            data,
            vae,
            encoders,
            text_length=recipe.diffusion.prompts.max_length,
            details_seed=details_seed_of(recipe.diffusion),
        )
    else:
        train_set = open_training_part(data, vae, encoders)
        parts = pipeline_parts(encoders, "text_encoder")
        weights |= {f"the base's {name}": weights_hash(encoder) for name, encoder in parts}
    inputs = prepare_inputs(
        encoders,
        vae,
        recipe.diffusion,
        train_set,
        held_out,
        cache_latents=data.cache_latents and not data.cache,
        workers=loader_workers(data.workers),
        timeout_s=data.timeout_s,
    )
    return inputs, weights
