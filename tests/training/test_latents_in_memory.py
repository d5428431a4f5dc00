"""What is kept in memory looks in each epoch as the data set does: mirrored anew, never cropped once for all."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.files import image_folder
from torch import Tensor

from davae.data import Mirrored, RenderedDataset, open_dataset
from davae.data.in_memory import ImagesInMemory, LatentsInMemory, MixedScales, Prepared, WithKept
from davae.errors import DavaeError
from davae.recipes.read import load_recipe
from davae.runtime import processes
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.runs.train import run_autoencoder


def encode(images: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(images, 4)[:, :2]


def mirroring(kind: str, tmp_path: Path) -> Any:
    if kind == "scenes":
        return open_dataset("procedural:6", resolution=16, flip=True)
    root = image_folder(tmp_path, {"a": 3, "b": 3})
    buckets = [(16, 16), (20, 12)] if kind == "buckets" else None
    return open_dataset(root, resolution=16, flip=True, seed=4, buckets=buckets)


@pytest.mark.parametrize("kind", ["scenes", "files", "buckets"])
def test_latents_are_those_of_the_images_in_every_epoch(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = mirroring(kind, tmp_path)
    with caplog.at_level(logging.INFO):
        kept = LatentsInMemory(source, encode, lambda item: {**item, "prepared": True}, shown="latents")
    assert "latents 6/6  0:00 left" in caplog.text
    beside = WithKept(source, {"base_latent": encode})
    halved = LatentsInMemory(Prepared(source, lambda item: {**item, "image": item["image"] / 2}), encode, dict)
    looks: list[list[bool]] = []
    for epoch in range(4):
        wanted = [source.item(i, epoch) for i in range(6)]
        for i, item in enumerate(wanted):
            latent = encode(item["image"][None])[0]
            found = kept.item(i, epoch)
            assert (found["prepared"], found["id"]) == (True, item["id"])
            torch.testing.assert_close(found["latent"], latent, rtol=0, atol=1e-6)
            torch.testing.assert_close(beside.item(i, epoch)["base_latent"], latent, rtol=0, atol=1e-6)
            assert torch.equal(beside.item(i, epoch)["image"], item["image"])
            torch.testing.assert_close(halved.item(i, epoch)["latent"], latent / 2, rtol=0, atol=1e-6)
        looks.append([torch.equal(kept.item(i, epoch)["latent"], kept[i]["latent"]) for i in range(6)])
    assert looks[1:] != [looks[0]] * 3  # other images are mirrored than in the first epoch


@pytest.mark.parametrize("kind", ["scenes", "files"])
def test_kept_images_are_mirrored_anew(kind: str, tmp_path: Path) -> None:
    source = mirroring(kind, tmp_path)
    kept = Mirrored(ImagesInMemory(source.unmirrored()), source.seed)
    for epoch in range(3):
        for i in range(6):
            difference = kept.item(i, epoch)["image"] - source.item(i, epoch)["image"]
            assert float(difference.abs().max()) <= 1 / 255 + 1e-6  # kept to a grey level


def test_random_crops_cannot_be_kept(tmp_path: Path) -> None:
    source = open_dataset(image_folder(tmp_path, {"a": 2}), resolution=16, crop="random")
    for keep in (lambda: LatentsInMemory(source, encode, dict), lambda: WithKept(source, {"base_latent": encode})):
        with pytest.raises(DavaeError, match=r"data\.crop=random .*data\.cache_latents=false"):
            keep()
    with pytest.raises(DavaeError, match=r"^recipe 'tiny': data\.crop=random .*data\.cache_latents=true"):
        load_recipe("tiny", ["data.crop=random"])
    assert load_recipe("tiny", ["data.crop=random", "data.cache_latents=false"]).data.crop == "random"


def test_mixed_scales_look_other_in_each_epoch_and_crops_are_as_often_mirrored_as_wholes(
    tmp_path: Path,
) -> None:
    """Both draws begin with the same seed here, as they do in a recipe."""
    source = open_dataset("procedural:100", resolution=16, flip=True)
    plain = source.unmirrored()

    def halve(images: Tensor) -> Tensor:
        return images[..., ::2, ::2]

    mixed = MixedScales(source, halve, crops=0.4)
    crops = {True: 0, False: 0}
    for epoch in range(2):
        for i in range(100):
            shown, image = mixed.item(i, epoch)["image"], source.item(i, epoch)["image"]
            if not torch.equal(shown, halve(image[None])[0]):
                crops[not torch.equal(image, plain[i]["image"])] += 1
    assert 20 < crops[True] < 60  # of about 40
    assert 20 < crops[False] < 60
    turned = open_dataset(image_folder(tmp_path, {"a": 1}), resolution=16, crop="random")
    assert not torch.equal(*(MixedScales(turned, halve, crops=0.0).item(0, e)["image"] for e in (0, 1)))


def test_loader_processes_read_what_is_kept_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would otherwise keep images of its own."""
    plain = RenderedDataset.item
    monkeypatch.setattr(RenderedDataset, "item", lambda self, i, e: {**plain(self, i, e), "caption": str(os.getpid())})
    source = open_dataset("procedural:5", resolution=16)
    kept = ImagesInMemory(source)
    kept.read_all(workers=2)
    assert len(kept.kept) == 5
    latents = LatentsInMemory(source, encode, dict, workers=2, timeout_s=60)
    for items in (kept, latents):
        assert str(os.getpid()) not in {items[i]["caption"] for i in range(5)}
    assert torch.equal(ImagesInMemory(source)[3]["image"], kept[3]["image"])
    alone = LatentsInMemory(source, encode, dict)
    assert all(torch.equal(alone[i]["latent"], latents[i]["latent"]) for i in range(5))


def test_what_is_sent_between_processes_is_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    count, world = 1001, 3
    each = -(-count // world)
    whole = torch.arange(float(count)).repeat_interleave(8).view(count, 8)
    sent: list[int] = []

    def everyone(own: list[tuple[Tensor, ...]]) -> list[list[tuple[Tensor, ...]]]:
        assert all(part.untyped_storage().nbytes() == part.nbytes for value in own for part in value)
        first = sum(sent)
        sent.append(len(own))
        positions = range(first, first + len(own))
        return [[(whole[min(r * each + i, count - 1)],) * 2 for i in positions] for r in range(world)]

    monkeypatch.setattr(processes, "rank_and_world", lambda: (1, world))
    monkeypatch.setattr(processes, "everyone", everyone)
    own = [(whole[i], whole[i]) for i in processes.share(count)]
    found = processes.gathered(own, count)
    assert torch.equal(torch.stack([one for one, _ in found]), whole)
    assert sum(sent) == each
    assert max(sent) <= 256


def test_an_autoencoder_learns_the_same_with_base_latents_in_memory(tmp_path: Path) -> None:
    """Three epochs of mirrored images."""
    for kept in ("true", "false"):
        data = ["data.path=procedural:16", "data.hold_out=4", "data.flip=true", f"data.cache_latents={kept}"]
        run_autoencoder("debug", [*data, "autoencoder.loop.validation_images=4"], tmp_path / kept)
    a, b = (read_metrics(tmp_path / kept / "metrics.jsonl") for kept in ("true", "false"))
    for one, other in zip(a, b, strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
