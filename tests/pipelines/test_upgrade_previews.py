"""Previews while sampling: base resolution, every k steps, by a tiny decoder or the base's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from tests.pipelines.parts import without_encoders
from tests.pipelines.upgrades import DETAILS, autoencoder, base_and_upgraded, base_image, noises
from torch import Tensor

from davae.bases.debug_pipelines import SMALL_PIPELINES, base_resolution, call_arguments, small_pipeline
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import Previews, set_preview_decoder, upgrade_pipeline

WITH_CALLBACK = [name for name in SMALL_PIPELINES if name != "dit"]


def tiny_decoder(channels: int = 4, levels: int = 3) -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * (levels + 1),
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * (levels + 1),
        num_decoder_blocks=(1,) * levels,
    ).eval()


def sample(name: str, pipe: DiffusionPipeline, previews: Previews, steps: int = 4, **further: Any) -> Any:
    arguments = call_arguments(name, scale=2) | {"num_inference_steps": steps} | further
    if name == "pixart-sigma":
        return pipe(**arguments, callback=previews.on_step).images
    return pipe(**arguments, callback_on_step_end=previews).images


@pytest.mark.parametrize("name", WITH_CALLBACK)
def test_the_last_preview_is_the_base_image(name: str) -> None:
    _, upgraded = base_and_upgraded(name)
    previews = Previews(upgraded, every=2, output_type="pt")
    noise = noises(name, upgraded)[1]
    latents = sample(name, upgraded, previews, latents=noise, output_type="latent")
    assert list(previews.images) == [1, 3]
    side = base_resolution(name)
    assert previews.images[1].shape == previews.images[3].shape == (1, 3, side, side)
    torch.testing.assert_close(previews.images[3], base_image(name, upgraded, latents), atol=1e-4, rtol=0)


def test_a_step_shows_the_image_that_it_predicts() -> None:
    """With one velocity for all steps, every preview is the final image, however noisy the latent is."""
    _, upgraded = base_and_upgraded("sd3")
    assert isinstance(upgraded.scheduler, FlowMatchEulerDiscreteScheduler)
    previews = Previews(upgraded, output_type="pt")
    velocity = torch.randn(1, 12, 8, 8, generator=torch.Generator().manual_seed(1))
    upgraded.transformer.forward = lambda **_: (velocity,)
    sample("sd3", upgraded, previews, steps=6, guidance_scale=1.0)
    assert list(previews.images) == [0, 1, 2, 3, 4, 5]
    for step in (1, 2, 3, 4):
        torch.testing.assert_close(previews.images[step], previews.images[5], atol=1e-4, rtol=0)
    # The very first step has nothing to compare with: it shows the noise.
    assert (previews.images[0] - previews.images[5]).abs().max() > 1e-2


def test_a_solver_s_memory_is_read() -> None:
    _, upgraded = base_and_upgraded("pixart-sigma")
    previews = Previews(upgraded, output_type="pt")
    predicted: list[Tensor] = []
    convert = upgraded.scheduler.convert_model_output
    upgraded.scheduler.convert_model_output = lambda *args, **kwargs: (
        predicted.append(convert(*args, **kwargs)) or predicted[-1]
    )
    sample("pixart-sigma", upgraded, previews)
    for step, latent in enumerate(predicted):
        assert torch.equal(previews.images[step], previews.decode(latent))


@pytest.mark.parametrize("name", ["sd3", "flux", "qwenimage"])
def test_a_tiny_decoder_sees_the_scaled_base_channels(name: str, tmp_path) -> None:
    decoder = tiny_decoder()
    base = small_pipeline(name)
    upgraded = upgrade_pipeline(base, autoencoder(name), preview_decoder=decoder)
    seen: list[Tensor] = []
    decoder.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    shown: list[int] = []
    previews = Previews(upgraded, every=3, on_preview=lambda step, images: shown.append(step))
    noise = noises(name, upgraded)[1]
    latents = sample(name, upgraded, previews, steps=3, latents=noise, output_type="latent")
    assert shown == [2]
    (image,) = previews.images[2]
    assert isinstance(image, Image.Image)
    assert image.size == (32, 32)
    # TAESD and kin take latents as the transformer sees them: no autoencoder's scaling is applied.
    if name == "sd3":
        torch.testing.assert_close(seen[0], latents[:, :4], atol=1e-5, rtol=0)
    else:
        assert seen[0].shape == (1, 4, 8, 8)
        torch.testing.assert_close(seen[0].sum(), latents[..., :16].sum(), atol=1e-3, rtol=0)
    upgraded.save_pretrained(tmp_path)
    assert "preview" not in (tmp_path / "model_index.json").read_text()
    assert "preview_decoder" not in upgraded.components


def test_kinds_of_output() -> None:
    _, upgraded = base_and_upgraded("sd3")
    latents = noises("sd3", upgraded, batch=2)[1]
    pictures = {kind: Previews(upgraded, output_type=kind).decode(latents) for kind in ("pil", "np", "pt")}
    assert [image.size for image in pictures["pil"]] == [(32, 32)] * 2
    assert pictures["np"].shape == (2, 32, 32, 3)
    np.testing.assert_allclose(pictures["np"].transpose(0, 3, 1, 2), pictures["pt"], atol=1e-6)


def test_packed_latents_that_are_not_square() -> None:
    _, upgraded = base_and_upgraded("flux")
    arguments = {"height": 64, "width": 96, "num_inference_steps": 2}
    with pytest.raises(DavaeError, match="24 tokens do not make that image: give Previews the height and width"):
        sample("flux", upgraded, Previews(upgraded), **arguments)
    previews = Previews(upgraded, height=64, width=96)
    sample("flux", upgraded, previews, **arguments)
    assert previews.images[1][0].size == (48, 32)
    sample("flux", upgraded, previews, **arguments | {"num_inference_steps": 1})
    assert list(previews.images) == [0], "a second run starts anew"


def test_what_cannot_be() -> None:
    _, upgraded = base_and_upgraded("sd3")
    with pytest.raises(DavaeError, match="at least 1"):
        Previews(upgraded, every=0)
    with pytest.raises(DavaeError, match="both height and width"):
        Previews(upgraded, height=64)
    with pytest.raises(DavaeError, match="takes 16 latent channels, the base latent has 4"):
        set_preview_decoder(upgraded, tiny_decoder(16))


@pytest.mark.parametrize("name", ["Flux2", "Chroma", "ZImage"])
def test_previews_of_pipelines_without_text_encoders(name: str) -> None:
    """The last preview is the base's image of what the pipeline itself hands to its autoencoder in the end."""
    base, call = without_encoders(name)
    pipe = upgrade_pipeline(base, AutoencoderDA.from_base(base.vae, detail_channels=DETAILS))
    previews = Previews(pipe, output_type="pt", height=64, width=96)
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **kwargs: (decoded.append(z), decode(z, *args, **kwargs))[1]
    pipe(**call, generator=torch.Generator().manual_seed(0), callback_on_step_end=previews)
    assert sorted(previews.images) == [0, 1]
    assert previews.images[1].shape == (1, 3, 32, 48)
    expected = (pipe.vae.decode_base(decoded[0]) / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(previews.images[1], expected, atol=1e-4, rtol=0)


def test_latents_in_a_packing_of_their_own_are_refused_by_name() -> None:
    base, _ = without_encoders("ZImage")
    pipe = upgrade_pipeline(base, AutoencoderDA.from_base(base.vae, detail_channels=DETAILS))
    with pytest.raises(DavaeError, match=r"ZImagePipeline have shape .* does not know how it packs"):
        Previews(pipe).decode(torch.zeros(1, 16, 48))
