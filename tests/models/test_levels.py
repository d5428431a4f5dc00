"""Nested details: each prefix of the latent is an image of its own, and the lowest is the base's, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import AlignmentLoss, ChannelStatistics, LatentLayout
from davae.models import AutoencoderDA, ResidualUpsample
from davae.models.autoencoder.warm_blocks import folded_up_block, warm_nested_up_block
from davae.models.base_adapters.adapter import Convolution
from tests.models.bases import NAMES, make_base, raw_decode, raw_latent

D1, D2 = 8, 16


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1


def make(name: str = "kl", **options: object) -> AutoencoderDA:
    """Two levels with statistics that are not 0 and 1."""
    torch.manual_seed(7)
    lower = AutoencoderDA.from_base(make_base(name), detail_channels=D1)
    lower.set_detail_statistics(torch.linspace(-1, 1, D1), torch.linspace(0.5, 2, D1))
    model = AutoencoderDA.from_base(lower, **{"detail_channels": D2, **options})  # type: ignore[arg-type]
    model.set_detail_statistics(torch.linspace(0, 1, D2), torch.linspace(1, 3, D2))
    return model


# ---------------------------------------------------------------------- prefixes


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_prefix_is_the_latent_of_its_level(name: str, images: Tensor) -> None:
    base, model = make_base(name), make(name)
    latent = model.encode(images).latent_dist.mode()
    assert latent.shape == (2, 4 + D1 + D2, 2, 4)
    half = model.reduce(images)
    small = model.downsample(images)
    assert half.shape[-2:] == (16, 32)
    assert small.shape[-2:] == (8, 16)

    z = raw_latent(base, small)  # level 0: the base VAE's own, bit for bit
    assert torch.equal(latent[:, :4], z)
    assert torch.equal(model.encode_base(images), z)
    expected = raw_decode(base, z)
    for prefix in (latent, latent[:, : 4 + D1], latent[:, :4]):
        assert torch.equal(model.decode_level(prefix, 0), expected)
        assert torch.equal(model.decode_base(prefix), expected)

    lower = model.at_level(1)  # level 1: an autoencoder of its own
    assert torch.equal(lower.encode(half).latent_dist.mode(), latent[:, : 4 + D1])
    assert torch.equal(model.decode_level(latent, 1), lower.decode(latent[:, : 4 + D1]).sample)
    assert model.decode_level(latent, 1).shape == half.shape
    assert torch.equal(model.decode_level(latent, 2), model.decode(latent).sample)
    assert model.decode(latent).sample.shape == images.shape


@torch.no_grad()
def test_levels_describe_the_prefixes() -> None:
    model = make()
    assert [level.scale for level in model.levels] == [1, 2, 4]
    assert [level.layout for level in model.levels] == [
        LatentLayout(4, 0),
        LatentLayout(4, D1),
        LatentLayout(4, D1 + D2),
    ]
    assert model.layout == LatentLayout(4, D1 + D2)
    assert model.own_layout == LatentLayout(4 + D1, D2)
    assert (model.scale, model.factor, model.spatial_compression) == (4, 2, 16)
    assert list(model.autoencoders()) == [model.base, model]
    assert model.base_vae is model.base.base
    with pytest.raises(DavaeError, match="no level 3: levels are 0 to 2"):
        model.decode_level(torch.zeros(1, 28, 2, 2), 3)
    with pytest.raises(DavaeError, match="level 1 needs 12 channels, the latent has 4"):
        model.decode_level(torch.zeros(1, 4, 2, 2), 1)
    with pytest.raises(DavaeError, match="no level 0 of details: levels are 1 to 2"):
        model.at_level(0)


@torch.no_grad()
def test_three_levels(images: Tensor) -> None:
    model = AutoencoderDA.from_base(make(), detail_channels=32)
    latent = model.encode(images).latent_dist.mode()
    assert latent.shape == (2, 60, 1, 2)
    assert [model.decode_level(latent, k).shape[-1] for k in range(4)] == [8, 16, 32, 64]
    with pytest.raises(DavaeError, match="positive multiple of 32 for scale 8, not 16"):
        AutoencoderDA.from_base(make(), detail_channels=16)


@pytest.mark.parametrize("name", NAMES)
def test_config_tells_pipelines_the_sizes(name: str) -> None:
    config = make(name).config
    assert 2 ** (len(config.block_out_channels) - 1) == 16
    assert config.latent_channels == 4 + D1 + D2
    if name == "dc":
        assert 2 ** (len(config.encoder_block_out_channels) - 1) == 16
    if name == "kl_lists":
        assert len(config.latents_mean) == len(config.latents_std) == 4 + D1 + D2
        assert config.latents_mean[:4] == make_base(name).config.latents_mean
    if name == "flux2":
        assert len(make(name).bn.running_mean) == 4 * (4 + D1 + D2)
    if name.startswith("kl"):
        assert config.sample_size == 4 * 32


@torch.no_grad()
def test_details_of_all_levels_have_unit_variance(images: Tensor) -> None:
    model = make()
    statistics = ChannelStatistics(D1 + D2)
    statistics.update(model.encode_details(images).mean)
    before = model.forward(images).sample
    for level, part in ((1, slice(0, D1)), (2, slice(D1, None))):
        model.set_detail_statistics(statistics.mean[part], statistics.std[part], level=level)
    latent = model.encode(images).latent_dist.mode()
    seen = ChannelStatistics(D1 + D2)
    seen.update(((latent - model.config.shift_factor) * model.config.scaling_factor)[:, 4:])
    assert torch.allclose(seen.mean, torch.zeros(D1 + D2).double(), atol=1e-4)
    assert torch.allclose(seen.std, torch.ones(D1 + D2).double(), atol=1e-4)
    assert torch.allclose(model.decode(latent).sample, before, atol=1e-4)  # networks see raw details
    with pytest.raises(DavaeError, match="no level 3 of details"):
        model.set_detail_statistics(torch.zeros(D1), torch.ones(D1), level=3)


@torch.no_grad()
def test_samples_vary_in_the_details_of_every_level_only(images: Tensor) -> None:
    posterior = make().encode(images).latent_dist
    noise = posterior.sample() - posterior.mode()
    assert not noise[:, :4].any()
    assert noise[:, 4 : 4 + D1].any()
    assert noise[:, 4 + D1 :].any()


# ---------------------------------------------------------------------- saving


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_save_and_load_on_every_kind_of_base(name: str, images: Tensor, tmp_path: Path) -> None:
    model = make(name)
    model.set_detail_statistics(torch.full((D1,), 0.3), torch.full((D1,), 0.7), level=1)  # after the nesting
    model.save_pretrained(tmp_path)
    again = AutoencoderDA.from_pretrained(tmp_path)
    latent = model.encode(images).latent_dist.mode()
    assert torch.equal(again.encode(images).latent_dist.mode(), latent)
    assert [list(v) for v in again.detail_statistics()] == [list(v) for v in model.detail_statistics()]
    for level in range(3):
        assert torch.equal(again.decode_level(latent, level), model.decode_level(latent, level))


@torch.no_grad()
def test_the_last_level_needs_no_decoder_of_the_others(images: Tensor, tmp_path: Path) -> None:
    model = make()
    latent = model.encode(images).latent_dist.mode()
    decoded, size = model.decode(latent).sample, sum(p.numel() for p in model.parameters())
    model.drop_base_decoder()
    dropped = {k for k in make().state_dict() if k not in model.state_dict()}
    assert any(k.startswith("base.joint_decoder.") for k in dropped)
    assert any(k.startswith("base.base.decoder.") for k in dropped)
    assert sum(p.numel() for p in model.parameters()) < 0.75 * size
    model.save_pretrained(tmp_path)
    for each in (model, AutoencoderDA.from_pretrained(tmp_path)):
        assert torch.equal(each.encode(images).latent_dist.mode(), latent)
        assert torch.equal(each.decode(latent).sample, decoded)
        for level in (0, 1):
            with pytest.raises(DavaeError, match="only its last level can be decoded"):
                each.decode_level(latent, level)
        with pytest.raises(DavaeError, match="no decoders left"):
            each.train_levels(together=True)


# ---------------------------------------------------------------------- what learns


def _train_once(model: AutoencoderDA, images: Tensor) -> set[str]:
    """Names of the parameters that one step of a loss on both levels changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    z, z_d = model.encode_base(images), model.encode_details(images).mean
    loss = model.decode_structured(z, z_d).square().mean() + z_d.square().mean()
    lower = model.at_level(1)
    loss = loss + lower.decode_structured(z, z_d[:, :D1]).square().mean()
    loss.backward()
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_earlier_levels_stay_frozen_unless_all_learn_together(images: Tensor) -> None:
    alone = make(start="random")
    moved = _train_once(alone, images)
    assert moved
    assert not any(name.startswith("base.") for name in moved)
    assert not any(module.training for module in alone.base.modules())
    assert {id(p) for p in alone.trained_parameters()} == {id(p) for p in alone.parameters() if p.requires_grad}

    together = make(start="random")
    together.train_levels(together=True)
    moved = _train_once(together, images)
    assert any(name.startswith("base.detail_encoder.") for name in moved)
    assert any(name.startswith("base.joint_decoder.") for name in moved)
    assert not any(name.startswith("base.base.") for name in moved)
    assert together.base.training
    assert not together.base_vae.training
    assert {id(p) for p in together.trained_parameters()} == {id(p) for p in together.parameters() if p.requires_grad}
    together.train_levels(together=False)
    assert not any(p.requires_grad for p in together.base.parameters())


# ---------------------------------------------------------------------- the start of a level


@pytest.mark.parametrize("name", ["kl", "kl_lists", "tiny"])
@pytest.mark.parametrize("order", ["base_first", "detail_first"])
@pytest.mark.parametrize("space", ["scaled", "raw"])
@torch.no_grad()
def test_a_new_level_starts_from_the_features_of_the_one_below(name: str, order: str, space: str) -> None:
    """Each feature of the level below is repeated, whatever spaces and orders the two levels have."""
    options = {"decoder_channel_order": order, "base_latent_space": space}
    model = make(name, **options)
    lower = model.base
    latent = torch.randn(2, 4 + D1, 5, 7)
    seen = []
    for level in (lower, model):
        level.up.register_forward_hook(lambda module, arguments, output: seen.append(output))
    lower.decode_structured(latent[:, :4], latent[:, 4:])
    model.decode_structured(latent, torch.randn(2, D2, 5, 7))
    expected = F.interpolate(seen[0], scale_factor=2.0, mode="nearest")
    inner = (..., slice(4, -4), slice(4, -4))  # offsets meet zero padding at the border
    assert torch.allclose(seen[1][inner], expected[inner], atol=1e-4)


@torch.no_grad()
def test_wide_details_add_what_the_level_below_cannot_hold() -> None:
    """With D = s^2 C the difference from the mean of each repeated cell goes through the base's stem."""
    torch.manual_seed(0)
    channels, features, below = 2, 6, 3
    layout = LatentLayout(channels + below, channels * 16)
    stem = Convolution(torch.randn(features, channels, 3, 3), torch.randn(features))
    lower = Convolution(torch.randn(features * 4, channels + below, 3, 3), torch.randn(features * 4))
    block = ResidualUpsample(layout.channels, features, 4)
    warm_nested_up_block(block, lower, stem, layout, 2, detail_first=False)
    prefix, fine = torch.randn(1, channels + below, 4, 3), torch.randn(1, channels, 16, 12)
    result = block(torch.cat([prefix, F.pixel_unshuffle(fine, 4)], dim=1))
    repeated = F.pixel_shuffle(F.conv2d(prefix, lower.weight, lower.bias, padding=1), 2)
    repeated = F.interpolate(repeated, scale_factor=2.0, mode="nearest")
    difference = fine - F.interpolate(F.avg_pool2d(fine, 2), scale_factor=2.0, mode="nearest")
    assert torch.allclose(result, repeated + F.conv2d(difference, stem.weight, padding=1), atol=1e-4)


@pytest.mark.parametrize("detail_first", [False, True])
@pytest.mark.parametrize("features", [6, 5])  # with a repeating shortcut, and with a projected one
@torch.no_grad()
def test_an_up_block_folds_into_one_convolution(features: int, detail_first: bool) -> None:
    layout = LatentLayout(3, 5)
    block = ResidualUpsample(8, features, 2)
    if block.shortcut_proj is not None:
        torch.nn.init.normal_(block.shortcut_proj.weight)
    z, z_d = torch.randn(1, 3, 4, 4), torch.randn(1, 5, 4, 4)
    folded = folded_up_block(block, layout, detail_first=detail_first)
    expected = block(torch.cat([z_d, z] if detail_first else [z, z_d], dim=1))
    found = F.conv2d(torch.cat([z, z_d], dim=1), folded.weight, folded.bias, padding=1)
    assert torch.allclose(F.pixel_shuffle(found, 2), expected, atol=1e-5)


@torch.no_grad()
def test_new_details_start_near_alignment(images: Tensor) -> None:
    """The grouped mean of the new details starts nearer to the base latent than zeros are."""
    smooth = F.interpolate(images, size=(128, 128), mode="bicubic").clamp(-1, 1)
    lower = AutoencoderDA.from_base(make_base("tiny"), detail_channels=16)
    model = AutoencoderDA.from_base(lower, detail_channels=64)
    target = model.alignment_target(model.encode_base(smooth))
    z_d = model.encode_own_details(smooth).mean
    loss = AlignmentLoss(LatentLayout(4, 64))
    assert loss(z_d, target) < 0.7 * loss(torch.zeros_like(z_d), target)


# ---------------------------------------------------------------------- the family's interface


@torch.no_grad()
def test_tiles_and_slices_reach_every_level(images: Tensor) -> None:
    large = F.interpolate(images, size=(160, 224), mode="bicubic").clamp(-1, 1)
    model = make("tiny")  # convolutions alone: nothing looks further than the overlap
    latent = model.encode(large).latent_dist.mode()
    whole = [model.decode_level(latent, level) for level in range(3)]
    model.enable_tiling(tile_sample_min_size=128, tile_overlap_factor=0.5)
    assert model.base.use_tiling
    tiled = model.encode(large).latent_dist.mode()
    assert not torch.equal(tiled, latent)
    assert (tiled - latent).abs().mean() < 0.02 * latent.std()
    for level in range(3):
        by_tiles = model.decode_level(latent, level)
        assert not torch.equal(by_tiles, whole[level])
        assert (by_tiles - whole[level]).abs().mean() < 0.02 * whole[level].std()
    model.disable_tiling()
    model.enable_slicing()
    assert model.base.use_slicing
    assert not model.base.use_tiling
    assert torch.allclose(model.decode(latent).sample, whole[2], atol=1e-5)
    model.disable_slicing()
    assert not model.base.use_slicing


def test_gradient_checkpointing_changes_nothing(images: Tensor) -> None:
    model = make(start="random", detail_dropout=0.0)
    model.at_level(1).register_to_config(detail_dropout=0.0)
    model.train_levels(together=True)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        details = model.encode_details(images).mean
        model.decode_structured(model.encode_base(images), details).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(name.startswith("base.detail_encoder.") for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-6), name
