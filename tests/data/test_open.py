"""What a path is taken for."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from davae.data import CLASSES, BatchStream, SkipLedger, open_dataset
from davae.errors import DavaeError
from davae.recipes.data import DataSettings, MoreImages
from davae.recipes.read import load_recipe
from davae.training.data import open_part
from tests.data.files import image_folder, picture


def test_procedural() -> None:
    data = open_dataset("procedural:24", resolution=16)
    assert len(data) == 24
    assert data.classes == list(CLASSES)
    assert len(open_dataset("procedural", resolution=16)) == 10_000
    held = open_dataset("procedural:24", resolution=16, hold_out=0.25, part="held_out")
    assert len(held) == 6
    assert len(open_dataset("procedural:24", resolution=16, hold_out=3, part="held_out")) == 3
    assert not {data[i]["id"] for i in range(24)} & {held[i]["id"] for i in range(6)}
    batch = next(iter(BatchStream(data, 4)))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert SkipLedger.for_dataset(data).total == 24
    for name in ("procedural:", "procedural:-3", "procedural:many"):
        with pytest.raises(DavaeError, match="positive whole number"):
            open_dataset(name, resolution=16)
    assert not len(open_dataset("procedural", resolution=16, part="held_out"))


def test_procedural_mirrored() -> None:
    plain, mirrored = (open_dataset("procedural:12", resolution=16, flip=flip) for flip in (False, True))
    turned = [torch.equal(mirrored[i]["image"], plain[i]["image"].flip(-1)) for i in range(12)]
    same = [torch.equal(mirrored[i]["image"], plain[i]["image"]) for i in range(12)]
    assert all(a != b for a, b in zip(turned, same))
    assert 0 < sum(turned) < 12
    mirrored.set_epoch(1)
    assert [torch.equal(mirrored[i]["image"], plain[i]["image"].flip(-1)) for i in range(12)] != turned


def test_hold_out_of_a_folder(tmp_path: Path) -> None:
    root = image_folder(tmp_path, {"a": 12, "b": 12})
    parts = [open_dataset(root, resolution=16, hold_out=0.25, part=p) for p in ("train", "held_out")]
    ids = [{d.id(i) for i in range(len(d))} for d in parts]
    assert not ids[0] & ids[1]
    assert len(ids[0] | ids[1]) == 24
    assert parts[0].classes == parts[1].classes == ["a", "b"]
    image_folder(tmp_path, {"new": 10})
    later = open_dataset(root, resolution=16, hold_out=0.25, part="held_out")
    assert {n for i in range(len(later)) if not (n := later.id(i)).startswith("new")} == ids[1]


def test_a_recipes_number_is_a_tenth_of_a_small_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Told once; a number of at most a third of the images holds, and those of a tenth are among its images."""
    root = image_folder(tmp_path, {"a": 12, "b": 12})
    data = DataSettings(path=str(root), resolution=16, hold_out=9)

    def ids(**changes: object) -> set[str]:
        part = open_part(data.model_copy(update=changes), "held_out")
        return {part.id(i) for i in range(len(part))}

    with caplog.at_level("INFO"):
        train = open_part(data, "train")
    assert (
        "hold_out=9 is more than a third of its 24 images, so about a tenth is held out (hold_out=0.1)" in caplog.text
    )
    assert len(train) + len(ids()) == 24
    assert ids() == ids(hold_out=0.1)
    assert ids() < ids(hold_out=8)
    assert len(ids(hold_out=8)) == 8
    caplog.clear()
    open_part(data.model_copy(update={"hold_out": 8}), "train")
    assert "tenth" not in caplog.text
    assert len(open_dataset(root, resolution=16, hold_out=9, part="held_out")) == 9  # as it is said in Python


def test_images_win_over_other_files_in_a_folder(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")
    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "y.tar").write_bytes(b"")
    assert len(open_dataset(tmp_path, resolution=16)) == 1


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    picture(0).save(tmp_path / "a.png")
    with pytest.raises(DavaeError, match="to train on image files, give their folder"):
        open_dataset(tmp_path / "a.png", resolution=16)
    with pytest.raises(DavaeError, match="no file matches"):
        open_dataset(str(tmp_path / "*.parquet"), resolution=16)
    for missing in (tmp_path / "nowhere", "./nowhere", "nowhere", "src/nowhere"):
        with pytest.raises(DavaeError, match="no such folder or file"):
            open_dataset(missing, resolution=16)


def test_several_sets_become_one_with_weights(tmp_path: Path) -> None:
    """Classes by name, ids that do not clash, held-out images of both and never among the training images."""
    first = image_folder(tmp_path / "photos", {"cat": 6, "dog": 4})
    second = image_folder(tmp_path / "drawings", {"dog": 5, "fox": 5})
    more = [MoreImages(path=str(second), repeats=3)]
    train = open_dataset(first, resolution=16, hold_out=0.2, repeats=2, more=more)
    held = open_dataset(first, resolution=16, hold_out=0.2, repeats=2, more=more, part="held_out")
    assert list(train.classes) == ["cat", "dog", "fox"]
    shown, kept = Counter(train.id(i) for i in range(len(train))), {held.id(i) for i in range(len(held))}
    assert not kept & shown.keys()
    assert len(kept) + len(shown) == 20
    assert set(shown.values()) == {2, 3}
    for i in range(len(train)):
        assert train.classes[train[i]["label"]] in train.id(i)
        assert shown[train.id(i)] == (3 if train.id(i).startswith("drawings:") else 2)
    assert train[0]["image"].shape == (3, 16, 16)
    alone = open_dataset(first, resolution=16)
    assert {name for name in shown | dict.fromkeys(kept) if not name.startswith("drawings:")} == {
        alone.id(i) for i in range(len(alone))
    }


def test_sets_of_their_own_resolution(tmp_path: Path) -> None:
    """Each image has its set's side, batches are of one side, and every image comes as often as without it."""
    first = image_folder(tmp_path / "photos", {"cat": 6, "dog": 4})
    second = image_folder(tmp_path / "drawings", {"fox": 7})
    more = [MoreImages(path=str(second), resolution=24, repeats=2)]
    train = open_dataset(first, resolution=16, hold_out=3, more=more, crop="random")
    held = open_dataset(first, resolution=16, hold_out=3, more=more, part="held_out")
    assert {tuple(held[i]["image"].shape) for i in range(len(held))} == {(3, 16, 16)}
    assert len(held) == 3
    assert not any(held.id(i).startswith("drawings:") for i in range(len(held)))
    assert len(train) == 7 + 2 * 7
    for i in range(len(train)):
        side = 24 if train.id(i).startswith("drawings:") else 16
        assert train[i]["image"].shape == (3, side, side)
    shown = [batch["image"].shape[-1] for batch in itertools.islice(BatchStream(train, 4), 60)]
    assert 0.6 < shown.count(24) / len(shown) < 0.73  # 14 of 21 images
    alone = open_dataset(first, resolution=16, hold_out=3, crop="random")
    assert [train.id(i) for i in range(7)] == [alone.id(i) for i in range(7)]
    assert torch.equal(train[2]["image"], alone[2]["image"])
    buckets = {16: [(16, 16), (24, 12)], 24: [(24, 24), (36, 18)]}  # the pictures are 48 x 40
    wide = open_dataset(first, resolution=16, more=more, buckets=buckets)
    assert {tuple(wide[i]["image"].shape[1:]) for i in range(len(wide))} == {(16, 16), (24, 24)}


@pytest.mark.parametrize("inside", [False, True], ids=["the same folder", "a folder inside"])
def test_an_image_of_two_sets_is_held_out_of_both(tmp_path: Path, inside: bool) -> None:
    """The same photographs at two resolutions, or the best of them again: what is measured on was never trained on."""
    root = image_folder(tmp_path / "photos", {"cat": 12, "dog": 12})
    again = root / "cat" if inside else root
    for resolution in (None, 24):
        more = [MoreImages(path=str(again), resolution=resolution)]
        parts = [open_dataset(root, resolution=16, hold_out=0.3, more=more, part=p) for p in ("train", "held_out")]
        train, held = (
            [Path(d.id(i).removeprefix("cat:").removeprefix("photos:")) for i in range(len(d))] for d in parts
        )
        names = {Path("cat") / name if len(name.parts) == 1 else name for name in train}
        assert len(held) == len(set(held)) > 0
        assert not names & set(held)
        assert len(names | set(held)) == 24
        assert len(train) == 24 - len(held) + (12 if inside else 24) - sum(
            h.parts[0] == "cat" or not inside for h in held
        )
        unseen = open_dataset(root, resolution=16, hold_out=0.3, part="held_out")
        assert set(held) == {Path(unseen.id(i)) for i in range(len(unseen))}


def test_resolutions_of_a_recipe(tmp_path: Path) -> None:
    data = DataSettings(path="a", resolution=64, more=[{"path": "a", "resolution": 32}, {"path": "b"}])  # type: ignore[list-item]
    assert (data.resolutions, data.of_one_size) == ([64, 32], False)
    half = data.reduced(2)
    assert (half.resolutions, half.more[1].resolution) == ([32, 16], None)
    with pytest.raises(ValueError, match="a list of sizes is for one resolution"):
        DataSettings(path="a", resolution=64, buckets=[(64, 64)], more=[MoreImages(path="a", resolution=32)])


def test_sets_that_cannot_be_joined_or_kept_are_told(tmp_path: Path) -> None:
    first = image_folder(tmp_path / "photos", {"cat": 2})
    with pytest.raises(DavaeError, match="procedural scenes cannot be joined"):
        open_dataset(first, resolution=16, more=[MoreImages(path="procedural")])
    with pytest.raises(DavaeError, match="no images at 'nowhere/at/all'"):
        open_dataset(first, resolution=16, more=[MoreImages(path="nowhere/at/all")])
    with pytest.raises(DavaeError, match=r"data\.cache holds each image once"):
        load_recipe("debug-text", ["data.cache=somewhere", "data.more=[{path: drawings, repeats: 2}]"])
