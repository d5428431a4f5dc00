"""Bases from video models: single frames, with and without the axis, and the branches as networks of images."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from tests.models.bases import make_base

NAMES = ("qwen", "qwen21")


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_branches_compute_what_the_base_does_with_one_frame(name: str) -> None:
    base = make_base(name)
    model = AutoencoderDA.from_base(base, detail_channels=4)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    features: list[torch.Tensor] = []
    base.encoder.conv_out.register_forward_pre_hook(lambda _, args: features.append(args[0]))
    base.decoder.conv_in.register_forward_hook(lambda *args: features.append(args[2]))
    model.adapter.encode(base, images)
    expected = model.adapter.decode(base, torch.randn(2, 4, 8, 12))
    torch.testing.assert_close(model.detail_encoder(images), features[0][:, :, 0], atol=1e-5, rtol=1e-5)
    found = model.joint_decoder(features[1][:, :, 0]).clamp(-1, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_trained_weight_is_used(name: str) -> None:
    model = AutoencoderDA.from_base(make_base(name), detail_channels=4).train()
    z, z_d = torch.randn(1, 4, 8, 8), model.encode_details(torch.rand(1, 3, 64, 64)).mean
    model.decode_structured(z, z_d).square().mean().backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused
    assert not any(isinstance(module, nn.Conv3d) for module in model.detail_encoder.modules())


@pytest.mark.parametrize("name", ["kl", *NAMES])
@torch.no_grad()
def test_an_image_is_a_video_of_one_frame(name: str) -> None:
    model = AutoencoderDA.from_base(make_base(name), detail_channels=4)
    images = torch.rand(2, 3, 32, 48)
    still, video = model.encode(images).latent_dist, model.encode(images[:, :, None]).latent_dist
    latent = still.mode()
    assert torch.equal(video.mode(), latent[:, :, None])
    assert torch.equal(video.std, still.std[:, :, None])
    torch.manual_seed(0)
    drawn = still.sample()
    torch.manual_seed(0)
    assert torch.equal(video.sample(), drawn[:, :, None])
    decoded = model.decode(latent).sample
    assert torch.equal(model.decode(latent[:, :, None]).sample, decoded[:, :, None])
    assert torch.equal(model.decode(latent[:, :, None], return_dict=False)[0], decoded[:, :, None])
    assert torch.equal(model.encode(images[:, :, None], return_dict=False)[0].mode(), latent[:, :, None])
    with pytest.raises(DavaeError, match="3 frames were given"):
        model.encode(images[:, :, None].expand(-1, -1, 3, -1, -1))


@torch.no_grad()
def test_opacity_is_dropped() -> None:
    model = AutoencoderDA.from_base(make_base("qwen21"), detail_channels=4)
    images = torch.rand(1, 3, 32, 32)
    half = torch.cat([images, torch.zeros(1, 1, 32, 32)], dim=1)[:, :, None]
    assert torch.equal(model.encode(half).latent_dist.mode()[:, :, 0], model.encode(images).latent_dist.mode())
    assert model.decode(torch.randn(1, 8, 4, 4)).sample.shape == (1, 3, 32, 32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [2, 4])
def test_config_tells_pipelines_the_sizes(name: str, scale: int, tmp_path) -> None:
    model = AutoencoderDA.from_base(make_base(name), scale=scale, detail_channels=8)
    model.save_pretrained(tmp_path)
    for vae in (model, AutoencoderDA.from_pretrained(tmp_path)):
        assert 2 ** len(vae.temperal_downsample) == vae.spatial_compression == 4 * scale
        assert vae.config.z_dim == 12
        assert vae.config.latents_mean == [0.1, 0.2, 0.3, 0.4] + [0.0] * 8
        assert vae.config.latents_std == [1.0, 2.0, 0.5, 1.5] + [1.0] * 8


def test_patches_are_refused() -> None:
    base = make_base("qwen21")
    base.register_to_config(patch_size=2)
    with pytest.raises(DavaeError, match="patch_size 2 is not supported"):
        AutoencoderDA.from_base(base, detail_channels=4)
