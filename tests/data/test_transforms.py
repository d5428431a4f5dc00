from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from davae.data import SquareCrop, image_to_tensor, item_generator
from davae.data.images.transforms import resize_to_cover
from davae.errors import DavaeError
from tests.data.files import picture


def ramp(width: int, height: int) -> Image.Image:
    """Red counts columns, green counts rows."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, columns * 0], axis=-1).astype(np.uint8))


def test_tensor_range_is_exact() -> None:
    image = Image.fromarray(np.array([[[0, 51, 255]]], dtype=np.uint8))
    tensor = image_to_tensor(image)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (3, 1, 1)
    assert tensor.flatten().tolist() == pytest.approx([-1.0, 51 / 127.5 - 1.0, 1.0], abs=1e-7)


def test_centre_crop_without_scaling_takes_the_middle() -> None:
    tensor = SquareCrop(16)(ramp(40, 16), item_generator(0, 0, 0))
    columns = ((tensor[0, 0] + 1) * 127.5).round()
    assert columns.tolist() == list(range(12, 28))


def test_halving_is_a_mean_of_blocks() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    found = np.asarray(resize_to_cover(Image.fromarray(pixels), (16, 16))).astype(float)
    expected = pixels.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    assert np.abs(found - expected).max() <= 1.0  # rounded once a direction


@pytest.mark.parametrize(("size", "expected"), [((100, 60), (53, 32)), ((33, 90), (32, 87)), ((20, 10), (64, 32))])
def test_short_side(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resize_to_cover(picture(0, size), (32, 32)).size == expected


def test_random_crops_vary_stay_inside_and_never_enlarge() -> None:
    crop = SquareCrop(32, "random")
    big = [crop(picture(0, (50, 70)), item_generator(1, 0, i)) for i in range(20)]
    assert all(t.shape == (3, 32, 32) for t in big)
    assert len({float(t.sum()) for t in big}) > 15
    # Short side exactly 32: nothing is scaled, so every crop is a window of the original.
    lefts = set()
    for i in range(30):
        tensor = ((crop(ramp(60, 32), item_generator(1, 0, i)) + 1) * 127.5).round()
        left = int(tensor[0, 0, 0])
        lefts.add(left)
        assert tensor[0, 0].tolist() == list(range(left, left + 32))
    assert min(lefts) >= 0
    assert max(lefts) <= 28
    assert len(lefts) > 10


def test_flip_mirrors_about_half() -> None:
    plain = SquareCrop(16)(ramp(16, 16), item_generator(0, 0, 0))
    flips = [SquareCrop(16, flip=True)(ramp(16, 16), item_generator(0, 0, i)) for i in range(200)]
    mirrored = sum(torch.equal(t, plain.flip(-1)) for t in flips)
    assert mirrored + sum(torch.equal(t, plain) for t in flips) == 200
    assert 70 < mirrored < 130


def test_randomness_depends_on_seed_epoch_and_index_only() -> None:
    def draw(*key: int) -> int:
        return int(item_generator(*key).integers(2**62))

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({draw(1, 2, 3), draw(2, 2, 3), draw(1, 3, 3), draw(1, 2, 4), draw(-1, 2, 3)}) == 5


def test_bad_settings() -> None:
    with pytest.raises(DavaeError, match="resolution"):
        SquareCrop(0)
    with pytest.raises(DavaeError, match="use center or random"):
        SquareCrop(8, "middle")  # type: ignore[arg-type]
