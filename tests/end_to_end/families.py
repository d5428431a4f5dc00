"""Small pipelines of every family, a few steps of each, on as many processes as there are."""

from __future__ import annotations

from functools import partialmethod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.models.embeddings import LabelEmbedding
from torch import nn

from davae.bases.debug_pipelines import base_resolution, small_pipeline
from davae.bases.tiny import debug_base
from davae.data import CLASSES, open_dataset
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.recipes.read import load_recipe
from davae.training.diffusion import DiffusionStage
from davae.training.diffusion.inputs import prepare_inputs
from davae.training.loop.loop import train

STEPS = 2  # DDP looks in the second for what got no gradient in the first
LOOP = {
    "steps": STEPS,
    "log_every": 1,
    "checkpoint_every": STEPS,
    "gradient_checkpointing": True,
    "ema_decay": None,
}


def stage(name: str, *overrides: str, **config: Any) -> DiffusionStage:
    """The diffusion stage of an upgraded small pipeline, or of the embedded debug base, without validation.

    Half the labels or prompts are dropped.
    ``config`` changes the transformer's configuration.
    """
    base, side = (debug_base(), 16) if name == "debug" else (small_pipeline(name), base_resolution(name))
    torch.manual_seed(0)
    if config:
        base.transformer = base.transformer.from_config({**base.transformer.config, **config})
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    pipeline = upgrade_pipeline(base, vae)
    if name == "debug":
        pipeline.transformer.register_to_config(class_dropout=0.5)
    if name == "dit":
        pipeline.labels = {known: number for number, known in enumerate(CLASSES)}
        for part in pipeline.transformer.modules():
            if isinstance(part, LabelEmbedding):
                part.dropout_prob = 0.5
    recipe = load_recipe("debug-text", ["diffusion.prompts.dropout=0.5", *overrides]).diffusion
    images = open_dataset("procedural:8", resolution=2 * side)
    none = open_dataset("procedural", resolution=2 * side, hold_out=0, part="held_out")
    return DiffusionStage(pipeline, vae.layout, recipe, prepare_inputs(pipeline, vae, recipe, images, none))


def train_all(names: list[str], batch: int, backend: str | None, out: Path) -> None:
    """Train every weight of each family, with blocks that are recomputed and, if there is a ``backend``, compiled."""
    torch.set_num_threads(1)
    loop = {**LOOP, "batch_size": batch, "compile": backend is not None}
    overrides = [f"diffusion.loop.{key}={'null' if value is None else value}" for key, value in loop.items()]
    overrides += ["diffusion.tune.mode=full", "diffusion.tune.new_channels_learning_rate=null"]
    overrides += ["diffusion.optimizer.learning_rate=1e-4"]
    with patch.object(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend)):
        for name in names:
            train(stage(name, *overrides), out / name, {})
