"""DiT, the second class-conditional family: upgraded and tuned with its own objective, noise and variance."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from torch import Tensor

from davae.bases.debug_pipelines import base_resolution, small_pipeline
from davae.data import open_dataset
from davae.diffusion import DdpmProcess
from davae.models import AutoencoderDA
from davae.pipelines import load_pipeline, upgrade_pipeline
from davae.recipes.read import load_recipe
from davae.training.diffusion import DiffusionStage
from davae.training.diffusion.inputs import prepare_inputs
from davae.training.loop.loop import train

BASE, DETAILS, PATCH = 4, 8, 2


def stage(*overrides: str) -> DiffusionStage:
    base = small_pipeline("dit")
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=DETAILS)
    side = 2 * base_resolution("dit")
    small = ["diffusion.loop.validation_images=2", "diffusion.loop.batch_size=4"]
    recipe = load_recipe("debug", [*small, *overrides])
    pipe = upgrade_pipeline(base, vae)
    images = open_dataset("procedural:12", resolution=side)
    held_out = open_dataset("procedural", resolution=side, hold_out=4, part="held_out")
    inputs = prepare_inputs(pipe, vae, recipe.diffusion, images, held_out)
    return DiffusionStage(pipe, vae.layout, recipe.diffusion, inputs)


def heads(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the head by output channel, [2, C + D]: of the noise and of the variance, summed."""
    by_channel = weight.unflatten(0, (PATCH, PATCH, 2, BASE + DETAILS)).abs().sum((0, 1, 4))
    return by_channel[0], by_channel[1]


@torch.no_grad()
def test_the_start_keeps_noise_and_variance_of_the_base() -> None:
    base, widened = small_pipeline("dit"), stage().pipeline
    latent = torch.randn(2, BASE + DETAILS, 8, 8)
    arguments = {"timestep": torch.tensor([10, 900]), "class_labels": torch.tensor([3, 1000])}
    expected = base.transformer(latent[:, :BASE], **arguments).sample
    found = widened.transformer.eval()(latent, **arguments).sample.unflatten(1, (2, BASE + DETAILS))
    torch.testing.assert_close(found[:, :, :BASE].flatten(1, 2), expected)
    assert found[:, :, BASE:].count_nonzero() == 0


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_its_objective_trains_the_noise_of_every_channel_and_the_variance_where_asked(weight: float) -> None:
    tuned = stage(f"diffusion.loss.variance_weight={weight}")
    assert isinstance(tuned.objective.process, DdpmProcess)
    item = tuned.dataset[0]
    batch = {name: torch.as_tensor(item[name])[None] for name in ("image", "latent", "label") if name in item}
    losses = tuned.objective.train()(batch, 4)
    losses["total"].backward()
    noise, variance = heads(tuned.pipeline.transformer.proj_out_2.weight.grad)
    assert (noise > 0).all()
    assert (variance > 0).all() if weight else (variance == 0).all()
    assert ("variance" in losses) == bool(weight)
    assert float(losses["base"].detach()) > 0


def test_a_tuned_pipeline_opens_again_and_makes_twice_the_size(tmp_path: Path) -> None:
    tuned = stage("diffusion.loss.variance_weight=0")
    before = {n: p.clone() for n, p in tuned.pipeline.transformer.named_parameters()}
    variance = heads(before["proj_out_2.weight"])[1]
    train(tuned, tmp_path / "run", {})
    head = tuned.pipeline.transformer.proj_out_2.weight
    assert not torch.equal(head, before["proj_out_2.weight"])
    torch.testing.assert_close(heads(head)[1], variance)  # no weight decay touches it either
    tuned.pipeline.save_pretrained(tmp_path / "pipe")
    opened = load_pipeline(tmp_path / "pipe")
    assert isinstance(opened, DiTPipeline)
    opened.set_progress_bar_config(disable=True)
    images = opened([3], num_inference_steps=2, guidance_scale=1.5, output_type="pt").images
    side = 2 * base_resolution("dit")
    assert images.shape == (1, 3, side, side)
