"""The start that is fitted to images: what it equals, and what it is near to, before any training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

import davae
from davae.data import open_dataset, read_items
from davae.errors import DavaeError
from davae.latents import grouped_mean
from davae.models import AutoencoderDA, Convolution, ResidualDownsample
from davae.models.autoencoder import fitted_start
from davae.models.autoencoder.fitted_start import _at_each_feature, _before_one_shuffle, folded_down_block
from davae.models.autoencoder.warm_blocks import START_LOGVAR
from davae.models.latent_space import native_reconstruction
from davae.training.autoencoder.stage import upscaled_base
from tests.models.bases import make_base


def smooth_images(count: int, side: int = 32) -> Tensor:
    """Images with structure at several scales, ``[count, 3, side, side]`` in [-1, 1]."""
    total = torch.zeros(count, 3, side, side)
    for cells in (2, 4, 8, 16, side):
        total += F.interpolate(torch.randn(count, 3, cells, cells), size=side, mode="bicubic") / cells**0.5
    return total.clamp(-1, 1)


def made_of(name: str, **options: Any) -> AutoencoderDA:
    base = make_base(name)
    for key, parameter in base.named_parameters():
        if key == "post_quant_conv.bias":
            parameter.data.zero_()  # the base's zero padding lacks it
    return AutoencoderDA.from_base(base, **options)


def fitted(name: str = "kl_plain", detail_channels: int = 16, **options: Any) -> AutoencoderDA:
    vae = made_of(name, detail_channels=detail_channels, start="fitted", **options)
    davae.fit_start(vae, [smooth_images(16, 16 * vae.scale)])
    return vae


def psnr(made: Tensor, images: Tensor) -> float:
    return float(-10 * torch.log10(((made - images) / 2).square().mean()))


@torch.no_grad()
def reconstruction(vae: AutoencoderDA, images: Tensor, details: float = 1.0) -> Tensor:
    return vae.decode_structured(vae.encode_prefix(images), details * vae.encode_own_details(images).mean)


@torch.no_grad()
def alignment_error(vae: AutoencoderDA, images: Tensor) -> float:
    target = vae.alignment_target(vae.encode_base(images))
    aligned = grouped_mean(vae.encode_own_details(images).mean, vae.layout.base_channels)
    return float((aligned - target).square().mean() / target.square().mean())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("kl_plain", {}),
        ("kl", {"base_latent_space": "raw"}),
        ("kl_lists", {"base_latent_space": "raw"}),
        ("dc", {"decoder_channel_order": "detail_first"}),
        ("kl_plain", {"scale": 4, "detail_channels": 64}),
    ],
)
def test_with_all_channels_it_is_the_base_at_full_size(name: str, options: dict[str, Any]) -> None:
    vae = fitted(name, **{"detail_dropout": 0.0, **options})
    images = smooth_images(4, 16 * vae.scale)
    native, made = native_reconstruction(vae, images), reconstruction(vae, images)
    assert psnr(made, native) > 100
    assert (vae.encode_own_details(images).logvar == START_LOGVAR).all()


def test_more_channels_tell_more_and_all_starts_are_better_than_warm_ones() -> None:
    images = smooth_images(8)
    found = []
    for details in (2, 4, 6, 8, 12, 16):
        vae, warm = (
            make(detail_channels=details, detail_dropout=0.0) for make in (fitted, lambda **o: made_of("kl_plain", **o))
        )
        native = native_reconstruction(vae, images)
        found.append(psnr(reconstruction(vae, images), native))
        assert found[-1] > psnr(reconstruction(warm, images), native)
        assert alignment_error(vae, images) <= alignment_error(warm, images)
    assert found == sorted(found)


@pytest.mark.parametrize("details", [16, 24, 48])
def test_a_further_level_is_fitted_to_the_level_below_at_full_size(details: int) -> None:
    below = fitted(detail_dropout=0.0)
    images = smooth_images(16, 64)
    warm, vae = (
        AutoencoderDA.from_base(below, detail_channels=details, detail_dropout=0.0, start=start)
        for start in ("warm", "fitted")
    )
    davae.fit_start(vae, images)
    wanted = reconstruction(below, images[:4])  # four times the positions
    enlarged = psnr(reconstruction(warm, images[:4], details=0.0), wanted)
    assert psnr(reconstruction(vae, images[:4]), wanted) > enlarged + 1
    assert alignment_error(vae, images[:4]) < alignment_error(warm, images[:4])


def test_the_same_on_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth_images(8)
    alone, shared = (made_of("kl", detail_channels=12, start="fitted") for _ in range(2))
    davae.fit_start(alone, [images])
    sums: list[Tensor] = []

    def both(own: Tensor) -> list[Tensor]:
        sums.append(own)
        return sums

    monkeypatch.setattr(fitted_start, "everyone", both)
    davae.fit_start(shared, images[:3].split(1))
    davae.fit_start(shared, [images[3:]])
    for (name, a), b in zip(alone.state_dict().items(), shared.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name


def test_a_loaded_model_and_a_converted_one_are_the_same(tmp_path: Path) -> None:
    """A model that ``from_base`` made with warm blocks gets the strided one, which its config names."""
    images = smooth_images(8)
    vae, warm = made_of("kl", detail_channels=8, start="fitted"), made_of("kl", detail_channels=8)
    for model in (vae, warm):
        davae.fit_start(model, [images])
    warm.save_pretrained(tmp_path)
    loaded = AutoencoderDA.from_pretrained(tmp_path)
    assert loaded.config.down_method == "stride"
    assert torch.equal(reconstruction(vae, images), reconstruction(loaded, images))


@pytest.mark.parametrize("details", [4, 6])  # a shortcut of means, one of a 1x1 convolution
def test_the_residual_block_folds_into_a_strided_convolution(details: int) -> None:
    vae = made_of("kl", detail_channels=details, start="random")
    if vae.down.shortcut_proj is not None:
        torch.nn.init.normal_(vae.down.shortcut_proj.weight)
    features = torch.randn(1, vae.down.conv.in_channels, 8, 6)
    folded = folded_down_block(vae)
    made = F.conv2d(features, folded.weight, folded.bias, stride=2, padding=1)
    assert torch.allclose(made, vae.down(features), atol=1e-5)


def test_what_blocks_of_two_levels_do_one_after_the_other_is_one_convolution() -> None:
    down = ResidualDownsample(3, 5, 2, method="stride", kernel_size=4, shortcut=False)
    assert down.conv.bias is not None
    features = torch.randn(1, 3, 16, 8)
    one = _at_each_feature(Convolution(down.conv.weight, down.conv.bias), 4)
    made = F.conv2d(features, one.weight, one.bias, stride=8, padding=1)
    assert torch.allclose(made, F.pixel_unshuffle(down(features), 4), atol=1e-5)

    conv = Convolution(torch.randn(3 * 4, 5, 3, 3), torch.randn(3 * 4))
    latent = torch.randn(1, 5 * 16, 3, 2)
    each = F.pixel_shuffle(F.conv2d(F.pixel_shuffle(latent, 4), conv.weight, conv.bias, padding=1), 2)
    one = _before_one_shuffle(conv, 4, 2)
    assert torch.allclose(F.pixel_shuffle(F.conv2d(latent, one.weight, one.bias, padding=1), 8), each, atol=1e-4)


def test_what_cannot_be_fitted_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = made_of("kl", detail_channels=8, start="fitted")
    with pytest.raises(DavaeError, match="none was given"):
        davae.fit_start(vae, [])
    with pytest.raises(DavaeError, match="not finite"):
        davae.fit_start(vae, [torch.full((1, 3, 16, 16), torch.nan)])
    with pytest.raises(DavaeError, match="must be multiples of 8"):
        davae.fit_start(vae, [torch.zeros(1, 3, 20, 16)])
    with pytest.raises(DavaeError, match="unknown start 'cold'"):
        made_of("kl", detail_channels=8, start="cold")
    with monkeypatch.context() as patch:
        patch.setattr(type(vae.adapter), "encoder_head", lambda *_: None)
        with pytest.raises(DavaeError, match=r"KLAdapter.encoder_head names no convolution"):
            davae.fit_start(vae, [smooth_images(1)])
    next(vae.detail_encoder.parameters()).data.mul_(2)
    with pytest.raises(DavaeError, match=r"not the base's any more \(conv_in.weight differs\)"):
        davae.fit_start(vae, [smooth_images(1)])


def _photographs(folder: Path, part: str, count: int, side: int) -> Tensor:
    images = open_dataset(folder / "imagenet_val_public", resolution=side, hold_out=100, part=part, quiet=True)
    return torch.stack([item["image"] for items in read_items(images, range(count), batch_size=8) for item in items])


def test_real_weights_and_photographs(real_images: Path, real_weights: Path) -> None:
    """TAESD3 at 128 px, photographs that were not fitted to: between the enlarged base and the base at full size."""
    base = AutoencoderTiny.from_pretrained(real_weights / "taesd3").float().eval()
    fitted_to, unseen = (_photographs(real_images, part, n, 128) for part, n in (("train", 12), ("held_out", 4)))
    vae = AutoencoderDA.from_base(base, detail_channels=48, detail_dropout=0.0)
    davae.fit_start(vae, fitted_to.split(4))
    made, native = psnr(reconstruction(vae, unseen), unseen), psnr(native_reconstruction(vae, unseen), unseen)
    assert native - 4 < made < native
    assert made > psnr(upscaled_base(vae, unseen), unseen)
    assert alignment_error(vae, unseen) < 0.12
