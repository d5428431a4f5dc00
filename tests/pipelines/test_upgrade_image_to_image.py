"""Image-to-image and inpainting pipelines: upgraded, they encode and decode at full resolution."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    QwenImageImg2ImgPipeline,
    QwenImageInpaintPipeline,
    SanaSprintImg2ImgPipeline,
    SanaTransformer2DModel,
    SCMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
)
from tests.pipelines.test_upgrade import tokens_seen
from tests.pipelines.upgrades import DETAILS, autoencoder
from torch import Tensor

from davae.bases.debug_pipelines import small_pipeline
from davae.pipelines import load_pipeline, upgrade_pipeline

IMAGE = [
    ("sd3", StableDiffusion3Img2ImgPipeline),
    ("flux", FluxImg2ImgPipeline),
    ("qwenimage", QwenImageImg2ImgPipeline),
]
INPAINT = [
    ("sd3", StableDiffusion3InpaintPipeline),
    ("flux", FluxInpaintPipeline),
    ("qwenimage", QwenImageInpaintPipeline),
]


def pair(name: str, cls: type[DiffusionPipeline]) -> tuple[DiffusionPipeline, Any]:
    base = cls.from_pipe(small_pipeline(name))
    base.set_progress_bar_config(disable=True)
    return base, upgrade_pipeline(base, autoencoder(name))


def photo(height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")


def call(pipe: DiffusionPipeline, side: int, **further: Any) -> Tensor:
    further = {"num_inference_steps": 4, "strength": 0.5, "output_type": "pt"} | further
    sizes = {"height": side, "width": side}
    generator = torch.Generator().manual_seed(0)
    return pipe("a fox", image=photo(side, side), generator=generator, **sizes, **further).images


def test_a_pipeline_that_reads_the_latent_of_a_deterministic_autoencoder() -> None:
    """SANA-Sprint asks its autoencoder for ``.latent``."""
    parts = small_pipeline("sana")
    transformer = SanaTransformer2DModel.from_config(
        parts.transformer.config, guidance_embeds=True, guidance_embeds_scale=0.1, qk_norm="rms_norm_across_heads"
    )
    base = SanaSprintImg2ImgPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        transformer=transformer,
        scheduler=SCMScheduler(),
    )
    upgraded = upgrade_pipeline(base, autoencoder("sana"))
    upgraded.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "strength": 0.6, "use_resolution_binning": False}
    image = call(upgraded, 128, **options)
    assert image.shape == (1, 3, 128, 128)
    assert image.isfinite().all()


@pytest.mark.parametrize(("name", "cls"), [*IMAGE, *INPAINT])
def test_sizes_tokens_and_processors(name: str, cls: type[DiffusionPipeline]) -> None:
    base, upgraded = pair(name, cls)
    assert isinstance(upgraded, cls)
    assert type(upgraded).__name__ == cls.__name__
    assert upgraded.vae_scale_factor == 2 * base.vae_scale_factor
    assert upgraded.image_processor.config.vae_scale_factor == 2 * base.image_processor.config.vae_scale_factor
    assert upgraded.image_processor.config.vae_latent_channels == 4 + DETAILS
    seen = []
    # diffusers' SD3 inpainting knows 16 channels only, which the small base has not.
    calls = [(upgraded, 64)] if (name, cls) == INPAINT[0] else [(base, 32), (upgraded, 64)]
    for pipe, side in calls:
        mask = {"mask_image": torch.ones(1, 1, side, side)} if (name, cls) in INPAINT else {}
        with tokens_seen(pipe) as tokens:
            image = call(pipe, side, **mask)
        assert image.shape == (1, 3, side, side)
        assert image.isfinite().all()
        seen.append(tokens)
    assert all(tokens == {16} for tokens in seen)


def decoded_latent(pipe: Any, **further: Any) -> Tensor:
    """What the pipeline gives to the autoencoder in the end, [1, C, h, w]."""
    latents: list[Tensor] = []
    decode = pipe.vae.decode
    try:
        pipe.vae.decode = lambda z, *args, **kwargs: (latents.append(z), decode(z, *args, **kwargs))[1]
        call(pipe, 64, **further)
    finally:
        del pipe.vae.decode
    return latents[0][:, :, 0] if latents[0].ndim == 5 else latents[0]


@pytest.mark.parametrize(("name", "cls"), IMAGE)
def test_details_of_the_image_come_through(name: str, cls: type[DiffusionPipeline]) -> None:
    """Untuned details predict nothing, so the noise on them stays; the image's own details lie underneath."""
    _, upgraded = pair(name, cls)
    vae, images = upgraded.vae, photo(64, 64) * 2 - 1
    latent = decoded_latent(upgraded)
    assert latent.shape == (1, 4 + DETAILS, 8, 8)
    shift = 100.0  # far from anything else
    encode = vae.encode_details
    try:
        vae.encode_details = lambda x: _moved(encode(x), shift)
        moved = decoded_latent(upgraded) - latent
    finally:
        del vae.encode_details
    assert images.shape == (1, 3, 64, 64)
    # They keep the share of the image that the first noise level leaves, in every detail channel.
    share = moved[:, 4:] / shift
    assert share.min() > 0.05
    torch.testing.assert_close(share, share.mean().expand_as(share), atol=1e-3, rtol=0)
    # Details do not reach the base channels while the input weights are zero.
    torch.testing.assert_close(moved[:, :4], torch.zeros_like(moved[:, :4]), atol=1e-3, rtol=0)


def _moved(posterior: Any, shift: float) -> Any:
    posterior.mean = posterior.mean + shift
    return posterior


@pytest.mark.parametrize(("name", "cls"), INPAINT)
def test_what_the_mask_keeps_is_the_image(name: str, cls: type[DiffusionPipeline]) -> None:
    """Latents outside the mask come from the encoded image, details included."""
    _, upgraded = pair(name, cls)
    vae, images = upgraded.vae, photo(64, 64) * 2 - 1
    expected = vae.encode(images).latent_dist.mode()
    found = decoded_latent(upgraded, mask_image=torch.zeros(1, 1, 64, 64))
    base, wide = vae.layout.base, vae.layout.detail
    if name == "sd3":  # its pipeline forgets the shift where it decodes
        expected = expected - vae.config.shift_factor
    torch.testing.assert_close(found[:, base], expected[:, base], atol=1e-4, rtol=1e-4)
    # Details are drawn from their posterior: the mean, and not much more.
    spread = vae.encode(images).latent_dist.std[:, wide].max()
    assert (found[:, wide] - expected[:, wide]).abs().max() < 6 * spread + 1e-3


def test_inpainting_leaves_the_transformer_as_it_was(tmp_path) -> None:
    _, upgraded = pair(*INPAINT[0])
    call(upgraded, 64, mask_image=torch.ones(1, 1, 64, 64))
    assert isinstance(upgraded.transformer, SD3Transformer2DModel)
    assert upgraded.transformer.config.in_channels == 4 + DETAILS
    with pytest.raises(ValueError, match="strength"):
        call(upgraded, 64, mask_image=torch.ones(1, 1, 64, 64), strength=2.0)
    assert isinstance(upgraded.transformer, SD3Transformer2DModel)
    upgraded.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    assert type(loaded) is type(upgraded)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == INPAINT[0][1].__name__
