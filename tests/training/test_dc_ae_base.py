"""Detail channels over DC-AE, the SANA case: f32 to f64 and from one image size to twice it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, SanaPipeline
from torch import Tensor

from davae.bases.debug_pipelines import base_resolution, small_pipeline
from davae.data import open_dataset
from davae.evaluation import psnr
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline

RESOLUTION, GRID = 64, 1
DETAILS = 12


@pytest.fixture(scope="module")
def images() -> Tensor:
    data = open_dataset("procedural:4", resolution=RESOLUTION)
    return torch.stack([data[number]["image"] for number in range(4)])


@pytest.fixture(scope="module")
def trained(images: Tensor) -> dict[str, Any]:
    """A base pipeline, its autoencoder's weights before, and an autoencoder after 25 steps."""
    base = small_pipeline("sana")
    before = {name: tensor.clone() for name, tensor in base.vae.state_dict().items()}
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=DETAILS).train()
    optimizer = torch.optim.Adam([p for p in vae.parameters() if p.requires_grad], lr=3e-3)
    z = vae.encode_base(images)
    for _ in range(25):
        # L1 on the means: in so few steps the noise of the posterior would hide what the details learn.
        loss = (vae.decode_structured(z, vae.encode_details(images).mean) - images).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"base": base, "before": before, "vae": vae.eval()}


@torch.no_grad()
def test_base_latents_stay_bit_equal(trained: dict[str, Any], images: Tensor) -> None:
    base, vae = trained["base"].vae, trained["vae"]
    assert isinstance(base, AutoencoderDC)
    assert (vae.base_compression, vae.spatial_compression) == (32, 64)
    assert all(torch.equal(t, trained["before"][name]) for name, t in vae.base_vae.state_dict().items())
    latent = vae.encode(images).latent_dist.mode()
    assert latent.shape == (4, vae.layout.base_channels + DETAILS, GRID, GRID)
    untouched = small_pipeline("sana").vae.requires_grad_(False)
    assert torch.equal(latent[:, vae.layout.base], untouched.encode(vae.reduce(images)).latent)


@torch.no_grad()
def test_a_few_steps_of_training_make_the_details_worth_more_than_none(trained: dict[str, Any], images: Tensor) -> None:
    vae = trained["vae"]
    z, z_d = vae.layout.split(vae.encode(images).latent_dist.mode())
    whole = psnr(images, vae.decode(vae.layout.join(z, z_d)).sample.clamp(-1, 1)).mean()
    without = psnr(images, vae.decode(vae.layout.join(z, torch.zeros_like(z_d))).sample.clamp(-1, 1)).mean()
    assert whole > without + 0.5


@torch.no_grad()
def test_sana_makes_twice_the_size_from_the_same_tokens(trained: dict[str, Any]) -> None:
    base, side = trained["base"], base_resolution("sana")
    upgraded = upgrade_pipeline(base, trained["vae"])
    assert isinstance(upgraded, SanaPipeline)
    tokens: dict[str, int] = {}

    def paint(name: str, pipe: SanaPipeline, size: int) -> Tensor:
        def count(module: torch.nn.Module, arguments: tuple[Tensor, ...], out: Tensor) -> None:
            tokens[name] = out.shape[1]

        pipe.set_progress_bar_config(disable=True)
        hook = pipe.transformer.patch_embed.register_forward_hook(count)
        made = pipe(
            "a hat",
            height=size,
            width=size,
            num_inference_steps=2,
            output_type="pt",
            use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0),
        ).images
        hook.remove()
        return made

    assert paint("base", base, side).shape == (1, 3, side, side)
    assert paint("upgraded", upgraded, 2 * side).shape == (1, 3, 2 * side, 2 * side)
    assert tokens["base"] == tokens["upgraded"] == (side // 32) ** 2
