"""Aspect-ratio buckets: sizes, who goes where, and an order in which nothing is lost."""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from davae.data import BatchStream, ImageDataset, ResumableSampler, open_dataset
from davae.data.images.buckets import (
    AREA_TOLERANCE,
    MAX_BUCKET_ASPECT,
    check_buckets,
    make_buckets,
    nearest_bucket,
    same_size_batches,
)
from davae.data.images.decode import upright_size
from davae.data.images.transforms import SquareCrop
from davae.data.loading.samplers import BucketSampler
from davae.errors import DavaeError
from tests.data.files import encoded, picture


@pytest.mark.parametrize(("resolution", "unit"), [(1024, 32), (512, 16), (256, 64), (2048, 64), (64, 16)])
def test_sizes_are_multiples_of_a_token_and_cost_what_a_square_costs(resolution: int, unit: int) -> None:
    sizes = make_buckets(resolution, unit)
    assert (resolution, resolution) in sizes
    assert len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert width % unit == 0
        assert height % unit == 0
        assert abs(width * height / resolution**2 - 1) <= AREA_TOLERANCE
        assert max(width, height) <= MAX_BUCKET_ASPECT * min(width, height)
        assert (height, width) in sizes


def test_sizes_at_1024_by_hand() -> None:
    sizes = make_buckets(1024, 32)
    assert {(1152, 896), (896, 1152), (1376, 768), (1440, 736)} <= set(sizes)  # 36x28, 43x24, 45x23 tokens
    assert sizes[0][0] < sizes[0][1]
    assert sizes == sorted(sizes, key=lambda s: s[0] / s[1])


def test_a_resolution_that_no_token_divides_names_the_nearest() -> None:
    with pytest.raises(DavaeError, match=r"100.*32 x 32.*nearest is 96"):
        make_buckets(100, 32)
    with pytest.raises(DavaeError, match=r"\[96, 100\].*multiples of 32"):
        check_buckets([(96, 96), (96, 100)], 32)
    with pytest.raises(DavaeError, match="empty"):
        check_buckets([], 32)


def test_the_nearest_bucket_keeps_most_of_the_image() -> None:
    sizes = make_buckets(1024, 32)
    for width, height in [(4000, 3000), (1080, 1920), (1000, 1000), (5000, 900), (1234, 987)]:
        aspect = width / height
        kept = [min(aspect, w / h) / max(aspect, w / h) for w, h in sizes]
        assert kept[nearest_bucket((width, height), sizes)] == pytest.approx(max(kept))
    assert nearest_bucket((10, 10), [(64, 64), (128, 128)]) == 1  # of equals the larger


def test_sizes_are_read_upright(tmp_path: Path) -> None:
    image = picture(0, (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "a.jpg", exif=exif)
    assert upright_size(tmp_path / "a.jpg") == (20, 40)
    assert upright_size(encoded(image, "PNG")) == (40, 20)


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(48, 24), (24, 48), (32, 32), (100, 80)])
def test_a_crop_of_any_shape_comes_from_the_whole_height_or_width(crop: Any, size: tuple[int, int]) -> None:
    transform = SquareCrop(32, crop)
    for seed, has in enumerate([(70, 40), (40, 90), (33, 33), (203, 151)]):
        image = transform.to_size(picture(seed, has), np.random.default_rng(seed), size)
        assert image.shape == (3, size[1], size[0])
        assert image.abs().max() <= 1


def test_a_square_crop_is_what_it_was(tmp_path: Path) -> None:
    image, transform = picture(3, (90, 70)), SquareCrop(32, "random", flip=True)
    square = transform(image, np.random.default_rng(1))
    assert torch.equal(square, transform.to_size(image, np.random.default_rng(1), (32, 32)))


SIZES = [(24, 48), (32, 32), (48, 24)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """4 tall, 5 square and 8 wide pictures, one of each damaged behind its header."""
    root = tmp_path_factory.mktemp("shapes")
    for i in range(4):
        picture(i, (50, 100)).save(root / f"tall{i}.png")
    for i in range(5):
        picture(10 + i, (61, 60)).save(root / f"square{i}.png")
    for i in range(8):
        picture(20 + i, (90, 47)).save(root / f"wide{i}.png")
    whole = (root / "tall2.png").read_bytes()
    (root / "tall2.png").write_bytes(whole[: len(whole) // 2])
    data = open_dataset(root, resolution=32, buckets=SIZES, flip=True)
    assert isinstance(data, ImageDataset)
    return data


def take(stream: Any, count: int) -> list[Any]:
    return list(itertools.islice(stream, count))


def test_every_image_has_the_size_of_its_bucket(images: ImageDataset, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(len(images)):
        width, height = SIZES[("tall", "square", "wide").index(images.id(i).rstrip(".png")[:-1])]
        assert images[i]["image"].shape == (3, height, width)  # also what stands in for the damaged one
    with caplog.at_level(logging.INFO):
        open_dataset(images.source.name, resolution=32, buckets=SIZES)
    assert "24 x 48: 4, 32 x 32: 5, 48 x 24: 8" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_of_one_bucket_and_a_resumed_stream_goes_on(images: ImageDataset, workers: int) -> None:
    whole = take(BatchStream(images, 3, seed=4), 14)
    assert len({batch["image"].shape for batch in whole}) == 3
    first = BatchStream(images, 3, seed=4, workers=workers)
    before = take(first, 4)  # inside the first epoch
    second = BatchStream(images, 3, seed=4)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for a, b in zip(whole, before + take(second, 10), strict=True):
        assert a["id"] == b["id"]
        assert torch.equal(a["image"], b["image"])


@pytest.mark.parametrize("batch", [1, 3, 4, 16])
def test_each_image_once_in_each_pass_over_its_bucket(batch: int) -> None:
    """Also in buckets smaller than a batch, which come around more often within a batch and more rarely."""
    numbers = [0] * 4 + [2] * 5 + [1] * 8
    keys = [key for part in take(BucketSampler(numbers, batch, 7), 400) for key in part]
    for bucket in (0, 1, 2):
        stream = [k for k in keys if numbers[k.position] == bucket]
        count = numbers.count(bucket)
        passes = [stream[i : i + count] for i in range(0, len(stream) - count, count)]
        assert len(passes) > 2
        for turn, part in enumerate(passes):
            assert {k.epoch for k in part} == {turn}
            assert {k.position for k in part} == {i for i, n in enumerate(numbers) if n == bucket}
        assert len({tuple(k.position for k in part) for part in passes}) > 1


def test_an_epoch_holds_every_image_where_buckets_are_whole_batches() -> None:
    numbers = [0] * 8 + [1] * 4 + [2] * 12
    sampler = BucketSampler(numbers, 2, 3)
    for epoch in range(3):
        part = [key for keys in take(sampler, 12) for key in keys]
        assert Counter(k.position for k in part) == dict.fromkeys(range(24), 1)
        assert {k.epoch for k in part} == {epoch}
        for _ in range(12):
            sampler.advance()
    order = [numbers[keys[0].position] for keys in take(BucketSampler(numbers, 2, 3), 12)]
    assert order != sorted(order), "buckets are mixed over the epoch"


def test_resuming_at_any_batch_goes_on() -> None:
    numbers = [0] * 4 + [2] * 5 + [1] * 8 + [3]
    whole = take(BucketSampler(numbers, 3, 1), 60)
    sampler = BucketSampler(numbers, 3, 1)
    for i in range(40):
        assert take(sampler, 2) == whole[i : i + 2]
        sampler.advance()


def test_processes_share_the_batches_of_one_bucket() -> None:
    numbers = [0] * 7 + [1] * 9
    one = take(BucketSampler(numbers, 6, 1), 8)
    pair = [take(BucketSampler(numbers, 3, 1, rank=r, world_size=2), 8) for r in range(2)]
    assert [a + b for a, b in zip(*pair)] == one


def test_other_buckets_or_batches_are_refused() -> None:
    state = BucketSampler([0, 0, 1, 1], 2, 0).state_dict()
    with pytest.raises(DavaeError, match="images per step"):
        BucketSampler([0, 0, 1, 1], 4, 0).load_state_dict(state)
    with pytest.raises(DavaeError, match="assignment of images"):
        BucketSampler([0, 1, 1, 1], 2, 0).load_state_dict(state)
    with pytest.raises(DavaeError, match="had no buckets"):
        BucketSampler([0, 1, 1, 1], 2, 0).load_state_dict(ResumableSampler(4, 2).state_dict())
    with pytest.raises(DavaeError, match="written with aspect-ratio buckets"):
        ResumableSampler(4, 2).load_state_dict(state)


def test_parts_that_stack(images: ImageDataset) -> None:
    parts = list(same_size_batches(images, range(len(images)), 3))
    assert sorted(i for part in parts for i in part) == list(range(len(images)))
    for part in parts:
        torch.stack([images[i]["image"] for i in part])
    assert list(same_size_batches([0] * 5, range(5), 2)) == [[0, 1], [2, 3], [4]]


def test_buckets_of_photographs(real_images: Path) -> None:
    """Little is cut off: the sizes lie close together."""
    folder = next(p for p in sorted(real_images.iterdir()) if p.is_dir())
    sizes = make_buckets(256, 16)
    data = open_dataset(folder, resolution=256, buckets=sizes, split=None, min_size=1)
    assert isinstance(data, ImageDataset)
    assert data.bucket_of is not None
    kept = []
    for position in range(0, len(data), max(1, len(data) // 40)):
        with data.source.open(data.indices[position]) as file:
            width, height = upright_size(file)
        w, h = sizes[data.bucket_of[position]]
        a, b = width / height, w / h
        if 0.5 <= a <= 2:
            kept.append(min(a, b) / max(a, b))
    assert min(kept, default=1.0) > 0.93
