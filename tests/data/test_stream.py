"""The stream of batches: the same after an interruption, complete over processes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from typing import Any

import pytest
import torch

from davae.data import BatchStream, ImageDataset, ResumableSampler, SkipLedger, open_dataset
from davae.errors import DavaeError
from tests.data.files import image_folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    root = image_folder(tmp_path_factory.mktemp("images"), {"a": 5, "b": 6})
    data = open_dataset(root, resolution=16, crop="random", flip=True)
    assert isinstance(data, ImageDataset)
    return data


def take(stream: BatchStream, count: int) -> list[dict[str, Any]]:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_stream_equals_an_uninterrupted_one(images: ImageDataset, workers: int) -> None:
    """11 images, batches of 4: the interruption after 4 batches lies inside the second epoch."""
    whole = take(BatchStream(images, 4, seed=5), 7)
    first = BatchStream(images, 4, seed=5, workers=workers)
    before = take(first, 4)
    state = json.loads(json.dumps(first.state_dict()))
    assert state["samples"] == 16  # what was taken, not what the workers have fetched ahead
    second = BatchStream(images, 4, seed=5, workers=workers)
    second.load_state_dict(state)
    after = take(second, 3)
    for a, b in zip(whole, before + after, strict=True):
        assert a["id"] == b["id"]
        assert a["label"].tolist() == b["label"].tolist()
        assert torch.equal(a["image"], b["image"])


def test_each_image_once_an_epoch_in_another_order_with_other_crops(images: ImageDataset) -> None:
    ids = [name for batch in take(BatchStream(images, 4), 11) for name in batch["id"]]  # 4 epochs
    epochs = [ids[i : i + 11] for i in range(0, 44, 11)]
    assert all(len(set(epoch)) == 11 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    seen = {}
    for batch in take(BatchStream(images, 11), 2):
        for name, image in zip(batch["id"], batch["image"]):
            assert name not in seen or not torch.equal(seen[name], image)
            seen[name] = image


@pytest.mark.parametrize(("length", "batch", "world"), [(24, 3, 4), (11, 2, 3), (3, 4, 2)])
def test_processes_share_every_epoch(length: int, batch: int, world: int) -> None:
    samplers = [ResumableSampler(length, batch, 1, rank=r, world_size=world) for r in range(world)]
    count = length * 2  # so many rounds hold a whole number of epochs
    keys = Counter(key for s in samplers for part in itertools.islice(s, count) for key in part)
    assert set(keys.values()) == {1}
    assert set(keys) == {(e, i) for e in range(count * batch * world // length) for i in range(length)}


def test_resume_with_another_number_of_processes() -> None:
    one = ResumableSampler(10, 2, rank=0, world_size=1)
    expected = [key for part in itertools.islice(one, 8) for key in part]
    for _ in range(2):
        one.advance()
    pair = [ResumableSampler(10, 3, rank=r, world_size=2) for r in range(2)]
    for sampler in pair:
        sampler.load_state_dict(one.state_dict())
    parts = [list(itertools.islice(s, 2)) for s in pair]
    found = [key for step in range(2) for rank in range(2) for key in parts[rank][step]]
    assert found == expected[4:16]


def test_sets_smaller_than_a_batch_wrap(images: ImageDataset) -> None:
    batch = next(iter(BatchStream(images, 25)))
    assert sorted(Counter(batch["id"]).values()) == [2] * 8 + [3] * 3


def test_another_set_or_seed_is_refused() -> None:
    state = ResumableSampler(10, 2, 0).state_dict()
    with pytest.raises(DavaeError, match=r"number of images was 10 .* and is 11 now"):
        ResumableSampler(11, 2, 0).load_state_dict(state)
    with pytest.raises(DavaeError, match=r"seed of the data order was 0 .* and is 1 now"):
        ResumableSampler(10, 2, 1).load_state_dict(state)


def test_bad_numbers(images: ImageDataset) -> None:
    for arguments in ({"length": 0}, {"batch_size": 0}, {"rank": 2, "world_size": 2}):
        with pytest.raises(DavaeError):
            ResumableSampler(**({"length": 4, "batch_size": 1} | arguments))
    with pytest.raises(DavaeError, match="workers"):
        next(iter(BatchStream(images, 1, workers=-1)))


def test_torch_randomness_is_left_alone(images: ImageDataset) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(BatchStream(images, 4), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_epoch_counts_passes(images: ImageDataset) -> None:
    stream = BatchStream(images, 11)
    take(stream, 3)
    assert stream.epoch == 3.0


def test_any_map_style_data_set_will_do() -> None:
    class Plain(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> dict[str, Any]:
            skipped = [("bad", "why")] if index == 1 else []
            return {
                "image": torch.full((3, 2, 2), float(index)),
                "label": index,
                "caption": f"c{index}",
                "id": str(index),
                "skipped": skipped,
            }

    batch = next(iter(BatchStream(Plain(), 3)))
    assert batch["image"][:, 0, 0, 0].tolist() == batch["label"].tolist()
    assert batch["label"].dtype == torch.long
    assert batch["caption"] == [f"c{i}" for i in batch["id"]]
    assert batch["skipped"] == [("bad", "why")]
    assert SkipLedger.for_dataset(Plain()).total == 3
