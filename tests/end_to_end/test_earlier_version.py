"""What version 0.1.0 (commit dc6755b) wrote opens, continues and makes the same images.

``tests/earlier`` holds a run of ``debug`` stopped after four of six steps, one of ``debug-text`` (LoRA, from a
cache) after two of four, the cache, both results, and ``expected.safetensors``: what that version made of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

import davae
from davae.recipes.read import load_recipe
from davae.training.runs.train import train_autoencoder, train_diffusion
from davae.warm_start import channel_parameters

EARLIER = Path(__file__).resolve().parents[1] / "earlier"
EXPECTED = load_file(EARLIER / "expected.safetensors")


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    """A working directory with copies of the runs, under the names that their recipes hold."""
    shutil.copytree(EARLIER, tmp_path / "runs")
    shutil.copytree(
        EARLIER / "debug-text-pipeline" / "vae", tmp_path / "runs" / "debug-text-autoencoder" / "autoencoder"
    )
    monkeypatch.chdir(tmp_path)
    return Path("runs")


def _assert_equal(found: Path, expected: Path) -> None:
    found_weights, expected_weights = load_file(found), load_file(expected)
    assert found_weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        torch.testing.assert_close(found_weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def test_a_stopped_autoencoder_run_continues_to_the_same_weights(runs):
    out = runs / "debug-autoencoder"
    result = train_autoencoder(load_recipe(out / "config.yaml"), out)
    steps = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"total"' in line]
    assert len(steps) == 6
    _assert_equal(result.result / "diffusion_pytorch_model.safetensors", runs / "debug-autoencoder-at-6.safetensors")


def test_a_stopped_diffusion_run_continues_from_its_cache_to_the_same_weights(runs):
    out = runs / "debug-text-diffusion"
    recipe = load_recipe("debug-text", ["data.cache=runs/debug-text-cache"])
    result = train_diffusion(recipe, out, runs / "debug-text-autoencoder" / "autoencoder")
    weights = Path("transformer") / "diffusion_pytorch_model.safetensors"
    found, expected = load_file(result.result / weights), load_file(runs / "debug-text-pipeline" / weights)
    assert found.keys() == expected.keys()
    widened = set(channel_parameters(DiffusionPipeline.from_pretrained(result.result).transformer))
    for (
        name,
        tensor,
    ) in expected.items():  # widened layers had 2e-3 throughout, in two steps more
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=2e-3 if name in widened else 5e-5, msg=name)


@torch.no_grad()
def test_a_saved_autoencoder_gives_the_same_latents_and_images():
    vae = davae.AutoencoderDA.from_pretrained(EARLIER / "debug-text-pipeline" / "vae").eval()
    latent = vae.encode(EXPECTED["image"]).latent_dist.mode()
    torch.testing.assert_close(latent, EXPECTED["latent"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(latent).sample, EXPECTED["decoded"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opener", [davae.load_pipeline, DiffusionPipeline.from_pretrained])
def test_a_saved_pipeline_makes_the_same_image(opener):
    pipe = opener(str(EARLIER / "debug-text-pipeline"))
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "a house",
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    torch.testing.assert_close(image, EXPECTED["generated"], rtol=1e-4, atol=1e-4)
