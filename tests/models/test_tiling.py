from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageOps
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.autoencoder.tiling import WholeImageNorms, tiled
from davae.runtime.package_files import TINY, shipped
from tests.models.bases import NAMES, make_base


@pytest.mark.parametrize("size", [(8, 8), (9, 17), (31, 12), (5, 40)])
@pytest.mark.parametrize("overlap", [0, 2, 4])
def test_a_pointwise_function_is_exact_at_any_size(size: tuple[int, int], overlap: int) -> None:
    x = torch.randn(2, 3, *size)
    result = tiled(lambda part: part * 2, x, tile=8, overlap=overlap, cell_in=1, cell_out=1)
    assert torch.allclose(result, x * 2, atol=1e-6)


def test_cells_grow_and_shrink() -> None:
    x = torch.randn(1, 1, 4 * 11, 4 * 9)
    pooled = tiled(lambda part: F.avg_pool2d(part, 4), x, tile=4, overlap=1, cell_in=4, cell_out=1)
    assert torch.allclose(pooled, F.avg_pool2d(x, 4), atol=1e-6)
    grown = tiled(
        lambda part: F.pixel_shuffle(part, 2),
        pooled.repeat(1, 4, 1, 1),
        tile=4,
        overlap=1,
        cell_in=1,
        cell_out=2,
    )
    assert torch.allclose(grown, F.pixel_shuffle(pooled.repeat(1, 4, 1, 1), 2), atol=1e-6)


def test_convolutions_are_exact_where_padding_gets_no_weight() -> None:
    """The outer quarter of the overlap hides the padding of three 3x3 convolutions."""
    torch.manual_seed(0)
    network = nn.Sequential(*[nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)])
    x = torch.randn(1, 3, 50, 70)
    with torch.no_grad():
        result = tiled(network, x, tile=24, overlap=12, cell_in=1, cell_out=1)
        assert torch.allclose(result, network(x), atol=1e-6)


@pytest.fixture(scope="module")
def picture() -> Tensor:
    """A smooth gradient with texture in one half, ``[1, 3, 104, 184]``: 13 x 23 latent positions."""
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 104), torch.linspace(0, 1, 184), indexing="ij")
    texture = 0.3 * torch.sin(60 * rows) * torch.sin(90 * columns) * (columns > 0.5)
    return torch.stack([rows + texture, columns, 1 - rows + texture])[None].clamp(0, 1) * 2 - 1


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_sizes_at_odd_tile_counts(name: str, picture: Tensor) -> None:
    model = AutoencoderDA.from_base(make_base(name), detail_channels=16)
    latent = model.encode(picture).latent_dist.mode()
    decoded, preview = model.decode(latent).sample, model.decode_base(latent)
    model.enable_tiling(tile_sample_min_size=64, tile_overlap_factor=0.5)
    again = model.encode(picture).latent_dist.mode(), model.decode(latent).sample, model.decode_base(latent)
    for tiles, whole in zip(again, (latent, decoded, preview)):
        assert tiles.shape == whole.shape
        assert not torch.equal(tiles, whole)
        if name == "tiny":  # convolutions alone: nothing looks further than the overlap
            assert (tiles - whole).abs().mean() < 0.01 * whole.std()
    model.disable_tiling()
    assert torch.equal(model.decode(latent).sample, decoded)


@torch.no_grad()
def test_tiles_share_the_norms_of_the_whole() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.SiLU(), nn.Conv2d(8, 2, 1))
    nn.init.normal_(network[1].weight)  # type: ignore[arg-type]
    x = torch.randn(2, 3, 24, 36) * torch.linspace(0.1, 3, 36)  # every tile has another contrast
    whole = network(x)
    with WholeImageNorms([network]):
        network(x)
        assert torch.allclose(network(x[..., 8:16, 20:30]), whole[..., 8:16, 20:30], atol=1e-5)
    assert torch.equal(network(x), whole)  # and afterwards nothing is left of it
    alone = network(x[..., 8:16, 20:30])
    assert not torch.allclose(alone, whole[..., 8:16, 20:30], atol=0.1)


def test_a_tile_that_holds_everything_changes_nothing(picture: Tensor) -> None:
    model = AutoencoderDA.from_base(make_base("kl"), detail_channels=8)
    with torch.no_grad():
        latent = model.encode(picture).latent_dist.mode()
        model.enable_tiling(tile_sample_min_size=184)
        assert torch.equal(model.encode(picture).latent_dist.mode(), latent)


@torch.no_grad()
def test_no_seam_on_a_photograph(real_images: Path) -> None:
    """With trained weights tiles are close to the whole, and their borders cannot be found in the difference."""
    folder = shipped(TINY)
    if folder is None:
        pytest.skip("the embedded base is not installed")
    path = sorted(real_images.glob("photos*/*.jpg"))[1]
    photograph = ImageOps.fit(Image.open(path).convert("RGB"), (400, 320))
    image = torch.from_numpy(np.asarray(photograph).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    model = AutoencoderDA.from_base(AutoencoderKL.from_pretrained(folder / "vae"), detail_channels=32)
    latent = model.encode(image).latent_dist.mode()
    whole = model.decode(latent).sample
    model.enable_tiling(tile_sample_min_size=256)
    by_tiles = model.encode(image).latent_dist.mode()
    for part in (model.layout.base, model.layout.detail):
        assert (by_tiles - latent)[:, part].abs().mean() < 0.05 * latent[:, part].std()
    error = model.decode(latent).sample - whole
    assert error.abs().mean() < 0.05
    # A seam would be a jump of the difference where a tile begins or ends.
    for side, others, borders in ((-1, (0, 1, 2), (144, 256)), (-2, (0, 1, 3), (64, 256))):
        steps = error.diff(dim=side).abs().mean(dim=others)
        for border in borders:
            assert steps[border - 2 : border + 2].max() < 3 * steps.median()


def test_sides_and_strides_as_in_diffusers() -> None:
    model = AutoencoderDA.from_base(make_base("kl"), detail_channels=8)
    pixels = torch.zeros(1, 3, 64, 96)
    seen: list[tuple[int, ...]] = []
    model.detail_encoder.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[-2:])))
    model.enable_tiling(
        tile_sample_min_height=32,
        tile_sample_min_width=48,
        tile_sample_stride_height=16,
        tile_sample_stride_width=48,
    )
    with torch.no_grad():
        model.encode(pixels)
    reduced, *tiles = seen
    assert reduced == (32, 48)
    assert tiles == [(32, 48)] * (3 * 2)
    model.enable_tiling(64)  # what is not said stays: half of the height overlaps, none of the width
    assert (model.tile_sample_stride_height, model.tile_sample_stride_width) == (32, 64)
    model.enable_tiling(tile_overlap_factor=0.25)
    assert (model.tile_sample_stride_height, model.tile_sample_stride_width) == (48, 48)


def test_tiles_of_every_level_cover_the_same_latent() -> None:
    lower = AutoencoderDA.from_base(make_base("kl"), detail_channels=8)
    model = AutoencoderDA.from_base(lower, detail_channels=24)
    model.enable_tiling(tile_sample_min_height=64, tile_sample_min_width=96, tile_sample_stride_width=64)
    assert model.below is not None
    assert (model.below.tile_sample_min_height, model.below.tile_sample_min_width) == (32, 48)
    assert model.below.tile_sample_stride_width == 32


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile_sample_min_size": 0}, "tile size 0 must be at least 8 pixels"),
        ({"tile_sample_min_size": -8}, "tile size -8 must be at least 8"),
        ({"tile_sample_min_size": True}, "not a multiple of 8"),
        ({"tile_sample_min_height": 0}, "must be at least 8"),
        ({"tile_sample_min_width": 60}, "not a multiple of 8"),
        ({"tile_sample_min_size": 64, "tile_sample_min_height": 64}, "pass either it or the height and width"),
        ({"tile_sample_min_size": 64, "tile_sample_stride_height": 24}, "must be at least 32 and at most 64"),
        ({"tile_sample_min_size": 64, "tile_sample_stride_width": 72}, "must be at least 32 and at most 64"),
        ({"tile_sample_min_size": 64, "tile_sample_stride_width": 60}, "not a multiple of 8"),
        ({"tile_overlap_factor": float("nan")}, "must lie in"),
        ({"tile_overlap_factor": 0.1, "tile_sample_stride_width": 64}, "both set the overlap"),
    ],
)
def test_sizes_that_are_none(options: dict[str, Any], words: str) -> None:
    model = AutoencoderDA.from_base(make_base("kl"), detail_channels=8)
    before = dict(vars(model))
    with pytest.raises(DavaeError, match=words):
        model.enable_tiling(**options)
    assert vars(model) == before


def test_options_out_of_range() -> None:
    model = AutoencoderDA.from_base(make_base("kl"), detail_channels=8)
    with pytest.raises(DavaeError, match="tile size 60 is not a multiple of 8"):
        model.enable_tiling(tile_sample_min_size=60)
    with pytest.raises(DavaeError, match="tile_overlap_factor must lie in"):
        model.enable_tiling(tile_overlap_factor=0.9)
    assert not model.use_tiling
