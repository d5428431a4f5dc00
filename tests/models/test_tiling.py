from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.tiling import tiled
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
def test_tiles_stay_close_to_the_whole(name: str, picture: Tensor) -> None:
    model = AutoencoderDA.from_base(make_base(name), detail_channels=16)
    latent = model.encode(picture).latent_dist.mode()
    decoded, preview = model.decode(latent).sample, model.decode_base(latent)
    model.enable_tiling(tile_sample_min_size=64, tile_overlap_factor=0.5)
    posterior = model.encode(picture).latent_dist
    assert posterior.mode().shape == latent.shape
    for part in (model.layout.base, model.layout.detail):
        assert_close(posterior.mode()[:, part], latent[:, part])
    assert_close(model.decode(latent).sample, decoded)
    assert_close(model.decode_base(latent), preview)
    model.disable_tiling()
    assert torch.equal(model.decode(latent).sample, decoded)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Group norms and attention see one tile at a time, so it cannot be equal."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().mean() < 0.1 * expected.std()


def test_a_tile_that_holds_everything_changes_nothing(picture: Tensor) -> None:
    model = AutoencoderDA.from_base(make_base("kl"), detail_channels=8)
    with torch.no_grad():
        latent = model.encode(picture).latent_dist.mode()
        model.enable_tiling(tile_sample_min_size=184)
        assert torch.equal(model.encode(picture).latent_dist.mode(), latent)


@torch.no_grad()
def test_no_seam_on_a_photograph(real_images: Path) -> None:
    """The error of tiling is no larger where tiles meet than elsewhere."""
    path = sorted(real_images.rglob("*.jpg"))[0]
    photograph = ImageOps.fit(Image.open(path).convert("RGB"), (192, 128))
    image = torch.from_numpy(np.asarray(photograph).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    model = AutoencoderDA.from_base(make_base("kl_plain"), detail_channels=16)
    latent = model.encode(image).latent_dist.mode()
    whole = model.decode(latent).sample
    model.enable_tiling(tile_sample_min_size=64, tile_overlap_factor=0.25)
    error = model.decode(latent).sample - whole
    steps = (
        error.diff(dim=-1).abs().mean(dim=(0, 1, 2))
    )  # a seam would be a jump of the error along one column
    assert steps.max() < 0.05 * whole.std()


def test_options_out_of_range() -> None:
    model = AutoencoderDA.from_base(make_base("kl"), detail_channels=8)
    with pytest.raises(DavaeError, match="tile size 60 is not a multiple of 8"):
        model.enable_tiling(tile_sample_min_size=60)
    with pytest.raises(DavaeError, match="tile_overlap_factor must lie in"):
        model.enable_tiling(tile_overlap_factor=0.9)
    assert not model.use_tiling
