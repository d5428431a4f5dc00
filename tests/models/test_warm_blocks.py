"""What the autoencoder gives before any training."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.latents import AlignmentLoss, LatentLayout, grouped_mean
from davae.models import AutoencoderDA, Convolution, ResidualDownsample, ResidualUpsample
from davae.models.autoencoder.warm_blocks import START_LOGVAR, warm_down_block, warm_up_block
from tests.models.bases import NAMES, make_base, raw_decode

C, F_ = 4, 16  # base channels, features


@pytest.fixture
def convolution() -> Convolution:
    torch.manual_seed(0)
    return Convolution(torch.randn(F_, C, 3, 3), torch.randn(F_))


def apply(convolution: Convolution, x: Tensor) -> Tensor:
    return F.conv2d(x, convolution.weight, convolution.bias, padding=1)


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("detail_first", [False, True])
def test_up_block_gives_the_first_features_of_a_full_resolution_latent(
    convolution: Convolution, scale: int, detail_first: bool
) -> None:
    """With D = s² C and details that hold a finer latent, the start is the base decoder on that latent."""
    layout = LatentLayout(C, C * scale**2)
    block = ResidualUpsample(layout.channels, F_, scale)
    warm_up_block(block, convolution, layout, detail_first=detail_first)
    fine = torch.randn(2, C, 6 * scale, 4 * scale)
    z_d = F.pixel_unshuffle(fine, scale)
    z = grouped_mean(z_d, C)  # perfectly aligned
    latent = torch.cat([z_d, z] if detail_first else [z, z_d], dim=1)
    with torch.no_grad():
        assert torch.allclose(block(latent), apply(convolution, fine), atol=1e-4)


@pytest.mark.parametrize("details", [2, 8, 16, 22])
@pytest.mark.parametrize("detail_first", [False, True])
def test_without_details_the_up_block_enlarges_the_base_latent(
    convolution: Convolution, details: int, detail_first: bool
) -> None:
    layout = LatentLayout(C, details)
    block = ResidualUpsample(layout.channels, F_, 2)
    warm_up_block(block, convolution, layout, detail_first=detail_first)
    z, z_d = torch.randn(1, C, 5, 7), torch.zeros(1, details, 5, 7)
    latent = torch.cat([z_d, z] if detail_first else [z, z_d], dim=1)
    with torch.no_grad():
        result = block(latent)
    enlarged = apply(convolution, F.interpolate(z, scale_factor=2.0, mode="nearest"))
    assert torch.allclose(result, enlarged, atol=1e-4)


def test_down_block_unshuffles_the_full_resolution_latent(convolution: Convolution) -> None:
    head = Convolution(torch.randn(C, F_, 3, 3), torch.randn(C))
    layout = LatentLayout(C, 4 * C)
    block = ResidualDownsample(F_, 2 * layout.detail_channels, 2, shortcut=False)
    warm_down_block(block, head, layout)
    features = torch.randn(1, F_, 8, 6)
    with torch.no_grad():
        mean, logvar = block(features).chunk(2, dim=1)
        fine = F.conv2d(features, head.weight, head.bias, padding=1)
    assert torch.allclose(mean, F.pixel_unshuffle(fine, 2), atol=1e-5)
    assert (logvar == START_LOGVAR).all()


@pytest.mark.parametrize("details", [2, 4, 8, 12, 16, 24, 32])
def test_other_counts_start_nearer_to_alignment_than_zero_details(details: int) -> None:
    """Rows serve s² channels each, so few rows can only hold mixtures; they are still the best ones."""
    torch.manual_seed(0)
    head = Convolution(torch.randn(C, F_, 3, 3), torch.randn(C))
    layout = LatentLayout(C, details)
    block = ResidualDownsample(F_, 2 * details, 2, shortcut=False)
    warm_down_block(block, head, layout)
    features = torch.randn(8, F_, 1, 1).expand(-1, -1, 16, 16)  # smooth: rows serve neighbouring positions too
    with torch.no_grad():
        z_d, _ = block(features).chunk(2, dim=1)
        z = F.avg_pool2d(F.conv2d(features, head.weight, head.bias, padding=1), 2)
    z_d, z = z_d[..., 1:-1, 1:-1], z[..., 1:-1, 1:-1]
    loss = AlignmentLoss(layout)
    share = loss(z_d, z) / loss(torch.zeros_like(z_d), z)
    assert share < (1e-8 if details >= 16 else 1.0 if details >= 4 else 1.0 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_base_folds_into_the_blocks(name: str) -> None:
    """Head and stem are the base's own layers: features to latent, and latent to features."""
    base = make_base(name)
    model = AutoencoderDA.from_base(base, detail_channels=16)
    adapter, inner = model.adapter, (slice(None), slice(None), slice(1, -1), slice(1, -1))
    images = torch.rand(1, 3, 32, 48) * 2 - 1
    head, stem = adapter.encoder_head(base), adapter.decoder_stem(base)
    assert head is not None
    assert stem is not None
    z = adapter.encode(base, images)
    assert torch.allclose(apply(head, model.detail_encoder(images)), z, atol=1e-5)
    z = torch.randn(1, 4, 8, 8)
    entry = Entry()
    if name == "dc":
        base.decoder.up_blocks.append(entry)  # the first to run
    elif name == "tiny":
        base.decoder.layers[1] = entry
    else:
        base.decoder.mid_block = entry
    with pytest.raises(StopHere) as stop:
        raw_decode(base, z)
    features = stop.value.features
    features = features[:, :, 0] if features.ndim == 5 else features
    # A post-quant convolution's offset meets zero padding in the outermost ring.
    assert torch.allclose(apply(stem, adapter.bound(z))[inner], features[inner], atol=1e-5)


class StopHere(Exception):
    def __init__(self, features: Tensor) -> None:
        self.features = features


class Entry(nn.Module):
    """Stands where the decoder's first features arrive."""

    def forward(self, features: Tensor, *_: object, **__: object) -> Tensor:
        raise StopHere(features)
