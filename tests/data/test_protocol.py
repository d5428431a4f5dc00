"""Every data set of the tree keeps what the base class promises, and a wrapper hands on what it does not change."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import davae
from davae.benchmark.training_stages import RandomImages, RandomLatents
from davae.data import (
    BatchStream,
    DatasetWrapper,
    ImageDataset,
    Item,
    ItemDataset,
    LatentCache,
    Mirrored,
    RenderedDataset,
    SkipLedger,
    as_item_dataset,
    open_dataset,
)
from davae.data.in_memory import ImagesInMemory, LatentsInMemory, MixedScales, Prepared, WithKept
from tests.data.files import image_folder, picture
from tests.data.test_cache import write

FACTS = tuple(name for name in ItemDataset.__annotations__ if name != "epoch")
BASES = {"Dataset", "ItemDataset", "DatasetWrapper"}
OTHERS = {
    "ItemDataset": "the base class itself",
    "DatasetWrapper": "the base class of wrappers",
    "_PlainDataset": "somebody else's data set, tested below",
    "ProceduralScenes": "the painter, which RenderedDataset puts behind the base class",
    "WatchedItems": "read by (epoch, position), by loaders alone",
}


class _Marked(ItemDataset):
    """Six images, none of whose facts is that of the base class."""

    def __init__(self, crop: str = "random", flip: bool = True) -> None:
        self.classes, self.skipped, self.commit = ["a", "b"], [("bad.png", "damaged")], "0" * 40
        self.bucket_of, self.flip, self.crop, self.seed = [0, 1, 0, 1, 0, 1], flip, crop, 7
        self.holds_latents = True

    def __len__(self) -> int:
        return 6

    def id(self, index: int) -> str:
        return f"{index}.png"

    def item(self, index: int, epoch: int) -> Item:
        image = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8).roll(index, -1)
        image = image.flip(-1) if self.flip and (index + epoch) % 2 else image
        return {"image": image, "label": 1, "caption": f"c{index}", "id": self.id(index), "skipped": []}

    def unmirrored(self) -> ItemDataset:
        return _Marked(self.crop, flip=False)


def _halve(images: Tensor) -> Tensor:
    return images[..., ::2, ::2]


def _prepare(item: Item) -> Item:
    return {**item, "prepared": True}


WRAPPERS: dict[type[ItemDataset], tuple[Callable[[ItemDataset], ItemDataset], set[str]]] = {
    ImagesInMemory: (ImagesInMemory, {"flip", "crop"}),
    LatentsInMemory: (lambda source: LatentsInMemory(source, _halve, _prepare), {"holds_latents"}),
    Mirrored: (lambda source: Mirrored(source, seed=3), {"flip", "seed"}),
    MixedScales: (lambda source: MixedScales(source, _halve, 0.5, seed=3), {"crop", "seed"}),
    Prepared: (lambda source: Prepared(source, _prepare), set()),
    WithKept: (lambda source: WithKept(source, {"base_latent": _halve}), set()),
}
"""How each is built, and which facts it sets itself."""


def _around(wrapper: type[ItemDataset]) -> ItemDataset:
    crop = "center" if wrapper in (LatentsInMemory, WithKept) else "random"  # what these refuse
    return WRAPPERS[wrapper][0](_Marked(crop))


def _built(kind: type[ItemDataset], folder: Path) -> ItemDataset:
    if kind in WRAPPERS:
        return _around(kind)
    images = RandomImages(3, 16)
    makers: dict[type[ItemDataset], Callable[[], ItemDataset]] = {
        ImageDataset: lambda: open_dataset(
            image_folder(folder, {"a": 3, "b": 3}), resolution=16, flip=True, buckets=[(16, 16), (20, 12)]
        ),
        RenderedDataset: lambda: open_dataset("procedural:6", resolution=16, flip=True),
        LatentCache: lambda: LatentCache(write(folder / "cache")),
        RandomImages: lambda: images,
        RandomLatents: lambda: RandomLatents(images, _halve),
    }
    return makers[kind]()


ALL = [*WRAPPERS, ImageDataset, RenderedDataset, LatentCache, RandomImages, RandomLatents]


def test_no_data_set_is_left_out() -> None:
    found = {
        node.name
        for file in Path(davae.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef) and BASES & {ast.unparse(base).partition("[")[0] for base in node.bases}
    }
    assert found == {kind.__name__ for kind in ALL} | OTHERS.keys()


@pytest.mark.parametrize("kind", ALL)
def test_a_data_set_is_what_it_says(kind: type[ItemDataset], tmp_path: Path) -> None:
    dataset = _built(kind, tmp_path)
    assert type(dataset) is kind
    epochs = [[dataset.item(i, epoch) for i in range(len(dataset))] for epoch in range(4)]
    for epoch, items in enumerate(epochs):
        dataset.set_epoch(epoch)
        assert all(_alike(item, dataset[i]) for i, item in enumerate(items))
    assert [dataset.id(i) for i in range(len(dataset))] == [item["id"] for item in epochs[0]]
    assert dataset.captions() == [item["caption"] for item in epochs[0]]
    assert all(("latent" in item) == dataset.holds_latents or kind in WRAPPERS for item in epochs[0])
    assert all(item["label"] < len(dataset.classes) or kind is LatentCache for item in epochs[0])
    assert dataset.bucket_of is None or len(dataset.bucket_of) == len(dataset)
    changes = any(not _alike(a, b) for items in epochs[1:] for a, b in zip(epochs[0], items))
    assert changes == (dataset.flip or dataset.crop == "random")
    still = dataset.unmirrored()
    assert not still.flip
    assert len(still) == len(dataset)
    shown = [[still.item(i, epoch) for i in range(len(still))] for epoch in range(4)]
    for items in shown if kind is not MixedScales else []:  # cuts another part in each epoch, mirrored or not
        assert all(map(_alike, items, shown[0]))
    assert dataset.flip == (still is not dataset)


@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_answers_as_what_it_wraps(kind: type[ItemDataset]) -> None:
    source = _around(kind)
    assert isinstance(source, DatasetWrapper)
    assert _forgotten(source, WRAPPERS[kind][1]) == []


def test_a_wrapper_that_forgets_is_noticed() -> None:
    class Forgetful(DatasetWrapper):
        def __init__(self, source: ItemDataset) -> None:
            self.source = source

        def item(self, index: int, epoch: int) -> Item:
            return self.source.item(index, epoch)

    assert _forgotten(Forgetful(_Marked()), set()) == list(FACTS)


def _forgotten(wrapper: DatasetWrapper, own: set[str]) -> list[str]:
    """The facts that differ from those of the data set within."""
    return [n for n in FACTS if n not in own and getattr(wrapper, n) != getattr(wrapper.source, n)]


def test_what_is_kept_of_the_first_images_answers_for_these() -> None:
    kept = LatentsInMemory(_Marked("center"), _halve, _prepare, limit=2)
    assert (len(kept), kept.bucket_of, kept.captions()) == (2, [0, 1], ["c0", "c1"])
    assert LatentsInMemory(RandomImages(2, 16), _halve, _prepare).holds_latents
    assert ImagesInMemory(_Marked()).crop == "center"


class _Own(Dataset[Item]):
    """What a person writes who knows torch alone."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Item:
        return {"image": torch.full((3, 8, 8), index / 4), "label": 0, "caption": f"c{index}", "id": "x"}


def test_a_data_set_of_ones_own_will_do() -> None:
    own = as_item_dataset(_Own())
    assert [getattr(own, name) for name in FACTS] == [getattr(ItemDataset, name) for name in FACTS]
    assert (len(own), own.id(1), own.captions()) == (3, "image 1", ["c0", "c1", "c2"])
    assert _alike(own.item(2, 5), _Own()[2])
    assert as_item_dataset(own) is own
    for wrapper, _ in WRAPPERS.values():
        wrapped: Any = wrapper(_Own())  # type: ignore[arg-type]
        assert len(wrapped) == 3
        assert wrapped.item(1, 0)["caption"] == "c1"


def test_captions_are_told_without_an_image(tmp_path: Path) -> None:
    class Told(_Own):
        def captions(self) -> list[str]:
            return ["a", "", "c"]

        def __getitem__(self, index: int) -> Item:
            raise AssertionError("an image is read")

    own = as_item_dataset(Told())
    assert (own.captions(), own.has_captions()) == (["a", "", "c"], True)
    for part in ("train", "held_out"):
        scenes = open_dataset("procedural:14", resolution=64, hold_out=13, part=part)
        drawn = [scenes[i]["caption"] for i in range(len(scenes))]
        scenes.scenes.resolution = 2**40  # cannot be painted
        assert scenes.captions() == drawn
        assert Mirrored(scenes).has_captions()
    picture(0, (32, 32)).save(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a fox")
    images = open_dataset(tmp_path, resolution=16)
    images.source.open = None
    assert (Mirrored(images).has_captions(), images.captions()) == (True, ["a fox"])


def test_what_a_data_set_of_ones_own_says_counts() -> None:
    class Telling(_Own):
        classes, skipped, bucket_of = ["a"], [("bad.png", "damaged")], [0, 1, 1]

        def id(self, index: int) -> str:
            return f"{index}.png"

        def item(self, index: int, epoch: int) -> Item:
            return {**self[index], "id": f"{epoch}/{index}.png"}

    own = as_item_dataset(Telling())
    assert (own.classes, own.id(2)) == (["a"], "2.png")
    assert SkipLedger.for_dataset(Telling()).total == 4
    batch = next(iter(BatchStream(Telling(), 2)))
    assert all(name.startswith("0/") for name in batch["id"])
    assert {name in ("0/0.png",) for name in batch["id"]} in ({True}, {False})  # of one bucket


def _alike(a: Item, b: Item) -> bool:
    same = [torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else _equal(a[k], b[k]) for k in a]
    return a.keys() == b.keys() and all(same)


def _equal(a: Any, b: Any) -> bool:
    return _alike(a, b) if isinstance(a, dict) else bool(a == b)
