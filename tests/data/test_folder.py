"""Folders as people have them: layout, captions, splits, and files that are no images."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from davae.data import BatchStream, SkipLedger, image_to_tensor, open_dataset
from davae.errors import DavaeError
from tests.data.files import GREY, deep_png, encoded, image_folder, picture, truncated_jpeg


def test_classes_captions_and_pixels(tmp_path: Path) -> None:
    image_folder(tmp_path / "set", {"fox": 2, "deep/owl": 2})
    (tmp_path / "set/fox/000.txt").write_text("  a red fox \n", encoding="utf-8")
    (tmp_path / "set/notes.csv").write_text("not an image")
    (tmp_path / "set/.hidden.png").write_bytes(b"")
    picture(9, (32, 32)).save(tmp_path / "set/loose.PNG")
    data = open_dataset(tmp_path / "set", resolution=32)
    assert data.classes == ["fox", "owl"]
    items = {item["id"]: item for item in (data[i] for i in range(len(data)))}
    assert list(items) == ["deep/owl/000.png", "deep/owl/001.png", "fox/000.png", "fox/001.png", "loose.PNG"]
    assert [item["label"] for item in items.values()] == [1, 1, 0, 0, -1]
    assert items["fox/000.png"]["caption"] == "a red fox"
    assert items["fox/001.png"]["caption"] == ""
    assert torch.equal(items["loose.PNG"]["image"], image_to_tensor(picture(9, (32, 32))))
    assert data.skipped == []


def test_one_folder_has_no_classes(tmp_path: Path) -> None:
    data = open_dataset(image_folder(tmp_path, {"photos": 2}), resolution=32)
    assert data.classes == []
    assert data[0]["label"] == -1


def test_metadata_captions(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 2, "b": 1})
    lines = [{"file_name": "000.png", "text": "first"}, {"file_name": "gone.png", "text": "none"}]
    (root / "a/metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    (root / "metadata.jsonl").write_text(json.dumps({"file_name": "b/000.png", "caption": "third"}) + "\n\n")
    data = open_dataset(root, resolution=32)
    assert [data[i]["caption"] for i in range(3)] == ["first", "", "third"]
    assert data.skipped == []
    assert data.source.problems == [("a/gone.png", "named in metadata.jsonl but not there")]
    (root / "metadata.jsonl").write_text('{"text": "no name"}')
    with pytest.raises(DavaeError, match=r"metadata.jsonl, line 1: no 'file_name'"):
        open_dataset(root, resolution=32)
    (root / "metadata.jsonl").write_text("{")
    with pytest.raises(DavaeError, match="line 1 is not JSON"):
        open_dataset(root, resolution=32)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("line", ["[" * 200_000, '{"file_name": ' + "9" * 5000 + "}", '{"file_name": '])
def test_metadata_that_is_no_json_names_its_line(tmp_path: Path, line: str) -> None:
    root = image_folder(tmp_path, {"x": 1})
    (root / "metadata.jsonl").write_text("\n" + line)
    with pytest.raises(DavaeError, match=r"metadata\.jsonl, line 2 is not JSON: \S"):
        open_dataset(root, resolution=16)


def test_splits(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"train/cat": 2, "train/dog": 2, "validation/cat": 1})
    assert len(open_dataset(root, resolution=32)) == 4
    assert open_dataset(root, resolution=32).classes == ["cat", "dog"]
    assert len(open_dataset(root, resolution=32, split="validation")) == 1
    assert len(open_dataset(root, resolution=32, split=None)) == 5
    with pytest.raises(DavaeError, match="has no split 'test'; it has train, validation"):
        open_dataset(root, resolution=32, split="test")
    vehicles = image_folder(tmp_path / "v", {"train": 2, "car": 2})  # a train is a class here
    assert open_dataset(vehicles, resolution=32).classes == ["car", "train"]


def test_linked_circles_end(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "a", {"x": 2})
    os.symlink(root, root / "x/again")
    assert len(open_dataset(root, resolution=32)) == 2


def test_awkward_folder_trains_and_names_what_it_skipped(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"good": 4})
    (root / "cut.jpg").write_bytes(truncated_jpeg())
    (root / "text.png").write_text("this is a text")
    (root / "dot.png").write_bytes(encoded(Image.new("RGB", (1, 1)), "PNG"))
    (root / "ink.jpg").write_bytes(encoded(picture(5).convert("CMYK"), "JPEG"))
    deep = torch.arange(40 * 40, dtype=torch.int32).reshape(40, 40).numpy().astype("uint16") * 40
    (root / "deep.png").write_bytes(deep_png(deep, GREY))
    (root / "latin.png").write_bytes(encoded(picture(6), "PNG"))
    (root / "latin.txt").write_bytes("café".encode("latin-1"))

    data = open_dataset(root, resolution=32)
    assert dict(data.skipped) == {
        "text.png": "not an image in a known format",
        "dot.png": "too small: 1 x 1, the short side needs 8 pixels",
    }
    ledger = SkipLedger.for_dataset(data)
    assert ledger.total == 10
    seen = set()
    stream = iter(BatchStream(data, 4))
    for _ in range(4):
        batch = next(stream)
        assert batch["image"].shape == (4, 3, 32, 32)
        seen.update(batch["id"])
        ledger.add(batch["skipped"])
    assert {"ink.jpg", "deep.png"} <= seen
    assert [name for name, _ in ledger.entries] == ["cut.jpg", "dot.png", "text.png"]
    assert "latin.png" in seen
    assert "truncated" in ledger.summary()
    assert "the caption cannot be read" in dict(data.source.problems)["latin.txt"]


def test_a_bad_image_is_replaced_by_the_next_readable_one(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "s", {"x": 5})
    for name in ("x/001.png", "x/002.png"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 2])
    data = open_dataset(root, resolution=32, crop="random")
    for _ in range(2):  # the second time from memory, with the same result
        item = data[1]
        assert item["id"] == "x/003.png"
        assert [name for name, _ in item["skipped"]] == ["x/001.png", "x/002.png"]
    assert not data[3]["skipped"]
    assert not torch.equal(data[3]["image"], item["image"])  # the same picture, another crop


def test_nothing_readable_and_nothing_there(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with pytest.raises(DavaeError, match=r"no images at .*s'"):
        open_dataset(root, resolution=32)
    root.mkdir()
    (root / "readme.txt").write_text("hello")
    with pytest.raises(DavaeError, match=r"no images in .*s: looked in it and below for files ending in .*\.jpg"):
        open_dataset(root, resolution=32)
    (root / "a.png").write_text("x")
    with pytest.raises(DavaeError, match=r"1 of 1 images of .* cannot be used, more than half"):
        open_dataset(root, resolution=32)
    (root / "a.png").write_bytes(encoded(picture(0), "PNG")[:300])
    with pytest.raises(DavaeError, match=r"none of the 1 images can be read; the first is a\.png"):
        open_dataset(root, resolution=32)[0]


def test_min_size_and_the_warning_about_enlarging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = image_folder(tmp_path, {"x": 3})  # 48 x 40
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(root, resolution=64)) == 3
    assert "3 of 3 images are smaller than 64 pixels" in caplog.text
    with pytest.raises(DavaeError, match="too small: 48 x 40, the short side needs 41 pixels"):
        open_dataset(root, resolution=64, min_size=41)


def test_epochs_change_crops_and_nothing_else(tmp_path: Path) -> None:
    data = open_dataset(image_folder(tmp_path, {"x": 2}), resolution=24, crop="random", flip=True, seed=3)
    first = data[1]["image"]
    data.set_epoch(1)
    second = data[1]["image"]
    data.set_epoch(0)
    assert not torch.equal(first, second)
    assert torch.equal(first, data[1]["image"])
    assert torch.equal(second, data.item(1, 1)["image"])
    assert torch.equal(data[-1]["image"], first)
    with pytest.raises(IndexError):
        data[2]


def test_real_images(real_images: Path) -> None:
    data = open_dataset(real_images / "classes", resolution=64, hold_out=0.05)
    held = open_dataset(real_images / "classes", resolution=64, hold_out=0.05, part="held_out")
    assert len(data.classes) == 10
    assert 0.03 < len(held) / (len(data) + len(held)) < 0.07
    assert not data.skipped
    item = data[len(data) // 2]
    assert item["id"].startswith(data.classes[item["label"]])
    assert item["image"].std() > 0.05
