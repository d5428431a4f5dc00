"""The embedded base: small enough to ship, and it makes what it is asked for."""

import pytest
import torch
import torch.nn.functional as F

from davae.bases.tiny import TINY, load_tiny
from davae.data import CLASSES, open_dataset
from davae.evaluation import psnr
from davae.recipes.settings import SampleSettings
from davae.training.diffusion import generate_classes


@pytest.fixture(scope="module")
def base():
    return load_tiny()


def _scenes(count, part="train"):
    data = open_dataset(f"procedural:{count}", resolution=128, hold_out=count, part=part)
    images = torch.stack([data[i]["image"] for i in range(count)])
    return F.interpolate(images, size=(64, 64), mode="bicubic", antialias=True), [
        data[i]["label"] for i in range(count)
    ]


def test_it_is_small_and_safe():
    files = [p for p in TINY.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 16 * 10**6
    assert {p.suffix for p in files} == {".json", ".safetensors", ".md"}


def test_it_is_loaded_in_float32_with_the_classes_of_the_scenes(base):
    assert base.vae.dtype == base.transformer.dtype == torch.float32
    assert [base.labels[name] for name in CLASSES] == list(range(12))


@torch.no_grad()
def test_it_reconstructs_held_out_scenes(base):
    images, _ = _scenes(24, "held_out")
    made = base.vae(images, sample_posterior=False).sample.clamp(-1, 1)
    assert float(psnr(images, made).mean()) > 24


@torch.no_grad()
def test_what_the_transformer_sees_has_unit_variance(base):
    images, _ = _scenes(48)
    latent = base.vae.encode(images).latent_dist.mean
    seen = (latent - base.vae.config.shift_factor) * base.vae.config.scaling_factor
    assert float(seen.mean()) == pytest.approx(0, abs=0.05)
    assert float(seen.std()) == pytest.approx(1, abs=0.05)


def test_samples_are_of_the_class_they_were_asked_for(base):
    """The nearest scene, by small blurred pictures, has the sample's class in at least 20 of 24 cases."""
    scenes, labels = _scenes(360)
    made = generate_classes(
        base, list(range(12)), 24, SampleSettings(num_inference_steps=15, guidance_scale=3.0), seed=5
    )
    small = [F.avg_pool2d(x, 4).flatten(1) for x in (made, scenes)]
    nearest = torch.cdist(*small).argmin(1)
    right = sum(labels[int(j)] == i % 12 for i, j in enumerate(nearest))
    assert right >= 20, f"{right} of 24"
