"""Stage 2 of an upgrade: the base pipeline, widened to the trained autoencoder's latents, is tuned on them."""

from pathlib import Path

import torch

from davae.bases.open import TEXT_ENCODERS, load_recipe_base
from davae.bases.upgrade import write_text_encoders
from davae.data import ItemDataset
from davae.data.cache import weights_hash
from davae.models import AutoencoderDA
from davae.models.lightningdit import restarted
from davae.pipelines import upgrade_pipeline
from davae.pipelines.saving.opening import load_autoencoder
from davae.pipelines.upgrade import layout_over
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.processes import loader_workers
from davae.training.cache.fingerprint import pipeline_parts
from davae.training.cache.write import open_cache
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.checkpoints.foundations import model_hash
from davae.training.checkpoints.run_directory import base_facts, data_facts
from davae.training.data import open_part, open_training_part
from davae.training.diffusion.inputs import Inputs, prepare_inputs
from davae.training.diffusion.stage import DiffusionStage
from davae.training.diffusion.tuning import started_from
from davae.training.loop.loop import TrainResult, train


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
    held_out = open_part(data, "held_out")
    inputs, weights = _inputs(recipe, vae, held_out)
    base = load_recipe_base(
        recipe, without=(TEXT_ENCODERS,), transformer_dtype=getattr(torch, settings.tune.frozen_dtype)
    )
    if settings.tune.add_qk_norm:
        base.transformer = restarted(base.transformer, qk_norm=True)
    weights |= {"the base's transformer": weights_hash(base.transformer)}
    pipeline = upgrade_pipeline(base, vae, copy=False)
    if settings.start_from is not None and not checkpoints(out / "checkpoints"):
        pipeline = started_from(settings.start_from, pipeline, base, settings.tune.mode)
    torch.manual_seed(settings.loop.seed)
    stage = DiffusionStage(
        pipeline,
        layout_over(base.vae, vae),
        settings,
        inputs,
        before=base,
        finish=lambda folder: write_text_encoders(recipe, folder),
    )
    stage.foundations = weights
    stage.facts = base_facts(recipe, *base.components.values()) | data_facts(data, held_out)
    del base, pipeline
    result = train(stage, out, recipe.model_dump(mode="json") | {"autoencoder_folder": str(autoencoder)})
    assert result is not None
    return result


def _inputs(recipe: UpgradeRecipe, vae: AutoencoderDA, held_out: ItemDataset) -> tuple[Inputs, dict[str, str]]:
    """The stage's inputs, and hashes of the weights that encoded them."""
    data = recipe.data
    encoders = load_recipe_base(recipe, without=("vae", "transformer"))
    weights = {"the autoencoder": model_hash(vae)}
    if data.cache:  # which has hashes of its own
        train_set: ItemDataset = open_cache(data, vae, encoders, text_length=recipe.diffusion.prompts.max_length)
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
