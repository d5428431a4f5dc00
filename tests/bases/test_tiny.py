"""The embedded base and its upgrade: small enough to ship, and they make what they are asked for."""

import pytest
import torch
import torch.nn.functional as F

from davae.bases.open import is_pipeline
from davae.bases.tiny import load_tiny
from davae.data import CLASSES, open_dataset
from davae.evaluation import psnr
from davae.evaluation.metrics.names import BASE_ENLARGED, REDUCED, UPGRADED
from davae.evaluation.reconstruction.baselines import all_reconstructions
from davae.pipelines.saving.opening import load_autoencoder, pipeline_place
from davae.recipes.settings import SampleSettings
from davae.runtime.package_files import TINY, TINY_UPGRADED, shipped
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


@pytest.fixture(scope="module")
def upgraded():
    return load_tiny(TINY_UPGRADED)


@pytest.mark.parametrize(("name", "megabytes"), [(TINY, 16), (TINY_UPGRADED, 24)])
def test_it_is_small_and_safe(name, megabytes):
    files = [p for p in shipped(name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < megabytes * 10**6
    assert {p.suffix for p in files} == {".json", ".safetensors", ".md"}


def test_the_upgrade_contains_the_base(base, upgraded):
    """The frozen base in the autoencoder is the embedded one, and it is opened by name wherever folders are."""
    own = upgraded.vae.base_vae.state_dict()
    assert own.keys() == base.vae.state_dict().keys()
    assert all(torch.equal(own[name], weight) for name, weight in base.vae.state_dict().items())
    assert upgraded.vae.dtype == upgraded.transformer.dtype == torch.float32
    alone = load_autoencoder(TINY_UPGRADED, dtype="saved").state_dict()
    assert all(torch.equal(alone[name], weight) for name, weight in upgraded.vae.state_dict().items())
    assert pipeline_place(TINY_UPGRADED) == str(shipped(TINY_UPGRADED))
    assert is_pipeline(TINY_UPGRADED)


@torch.no_grad()
def test_the_upgrade_rebuilds_what_the_base_and_a_reduction_lose(base, upgraded):
    data = open_dataset("procedural:24", resolution=128, hold_out=24, part="held_out")
    images = torch.stack([data[i]["image"] for i in range(24)])
    made = all_reconstructions(upgraded.vae, images)
    reached = {name: float(psnr(images, image).mean()) for name, image in made.items()}
    assert reached[UPGRADED] > reached[BASE_ENLARGED] + 1.5
    assert reached[UPGRADED] > reached[REDUCED] + 1.5


@torch.no_grad()
def test_the_upgrade_keeps_the_bases_scenes(base, upgraded):
    """Base previews of the upgrade's samples are nearer to the base's own samples than those of other seeds are."""
    settings, classes = SampleSettings(num_inference_steps=10, guidance_scale=3.0), list(range(12))
    own = generate_classes(base, classes, 24, settings, seed=0)
    made = generate_classes(upgraded, classes, 12, settings, seed=0)
    assert made.shape[-2:] == (128, 128)
    reduced = F.interpolate(made, size=(64, 64), mode="bicubic", antialias=True)

    def apart(x, y):
        return float((x - y).square().mean().sqrt())

    assert apart(reduced, own[:12]) < 0.6 * apart(own[:12], own[12:])


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
