"""What is wrong with a file is asked again; a disk that is away for a moment costs no image."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path
from typing import BinaryIO

import pytest

from davae.data import SkipLedger, open_dataset
from davae.data.images import decode
from davae.data.images.decode import UnreadableImage, patiently
from davae.data.sources.folder import FolderSource
from davae.errors import DavaeError
from davae.runtime.atomic_files import MARK
from tests.data.files import picture


def test_each_file_counts_once() -> None:
    ledger = SkipLedger(100)
    ledger.add([("b.png", "damaged"), ("a.png", "too small")])
    ledger.add([("b.png", "damaged again")])
    assert ledger.entries == [("a.png", "too small"), ("b.png", "damaged")]
    other = SkipLedger(100, [("c.png", "not an image")])
    other.add(ledger.entries)
    assert other.count == 3


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(4):
        picture(i, (40, 40)).save(folder / f"{i}.png")
    return folder


class Disk:
    """Fails to open the named files so many times, with one of the system's errors."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int = errno.EIO) -> None:
        self.failures: dict[str, int] = {}
        self.opened: list[str] = []
        self.pauses: list[float] = []
        plain = FolderSource.open

        def open_file(source: FolderSource, index: int) -> BinaryIO:
            name = source.id(index)
            self.opened.append(name)
            if self.failures.get(name, 0) > 0:
                self.failures[name] -= 1
                raise OSError(number, "as the disk says", str(source.root / name))
            return plain(source, index)

        monkeypatch.setattr(FolderSource, "open", open_file)
        monkeypatch.setattr(decode.time, "sleep", self.pauses.append)


def test_a_disk_that_is_away_for_a_moment_costs_no_image(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    disk.failures = {"0.png": 2, "1.png": 1}
    data = open_dataset(photos, resolution=32)
    assert (len(data), list(data.skipped)) == (4, [])
    disk.failures = {"2.png": 3}
    assert (data[2]["id"], data[2]["skipped"]) == ("2.png", [])
    assert disk.pauses == [0.1, 0.5, 0.1, 0.1, 0.5, 2.0]


def test_what_the_disk_did_not_give_is_asked_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data = open_dataset(photos, resolution=32)
    disk = Disk(monkeypatch)
    disk.failures = {"1.png": 5, "2.png": 1}
    item = data[1]  # five tries, then the one behind stands in, and its neighbour is tried once
    assert (item["id"], item["skipped"]) == ("3.png", [])
    assert "1.png: cannot be opened (Input/output error) this time" in caplog.text
    assert data[1]["id"] == "1.png"
    assert data.item(0, 0)["id"] == "0.png"
    disk.failures = dict.fromkeys((f"{i}.png" for i in range(4)), 99)
    disk.opened.clear()
    with pytest.raises(DavaeError, match=r"none of the 4 images can be read; the first is 0.png: cannot be opened"):
        data[0]
    assert len(disk.opened) == 5 + 3


@pytest.mark.parametrize("number", [errno.EACCES, errno.EISDIR, errno.ENOENT])
def test_a_fault_of_the_file_is_not_waited_for(number: int, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(photos, resolution=32)
    disk = Disk(monkeypatch, number)
    disk.failures = {"1.png": 99}
    assert data[1]["skipped"][0][0] == "1.png"
    assert disk.pauses == []


def test_a_file_is_gone_or_its_whole_folder_is_away(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode.time, "sleep", lambda _: None)
    for name, lasting in ((photos / "9.png", True), (photos / "away" / "9.png", False)):
        with pytest.raises(UnreadableImage) as caught:
            patiently(lambda name=name: name.open("rb"))  # type: ignore[misc]
        assert caught.value.lasting is lasting


def test_rows_without_an_image_are_told_and_are_no_bad_images(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"file_name": f"{i}.png", "text": f"picture {i}"} for i in range(100)]
    (photos / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with caplog.at_level(logging.WARNING):
        data = open_dataset(photos, resolution=32)
    SkipLedger.for_dataset(data).check()
    assert (len(data), list(data.skipped)) == (4, [])
    assert "96 problems:\n  4.png: named in metadata.jsonl but not there" in caplog.text


def test_runs_and_caches_below_the_folder_are_passed_over(photos: Path) -> None:
    kinds = {"run": ("config.yaml", "environment.json"), "c": ("fingerprint.json", "index.jsonl"), "made": (MARK,)}
    for below, marks in kinds.items():
        (photos / below / "samples").mkdir(parents=True)
        picture(9, (40, 40)).save(photos / below / "samples" / "step-1.png")
        assert len(open_dataset(photos, resolution=32)) == 5
        for mark in marks:
            (photos / below / mark).write_text("{}")
        assert len(open_dataset(photos, resolution=32)) == 4
        assert len(open_dataset(photos / below, resolution=32)) == 1  # asked for by name


def test_pictures_that_verbs_wrote_below_the_folder_are_passed_over(photos: Path) -> None:
    """Figures, generated images and demos are known by their mark, or by the file that says what they are."""
    marks = {
        "generated": (".davae", {"kind": "images"}),
        "compared": ("comparison.json", {"autoencoders": {}, "resolution": 32}),
        "inspected": ("inspection.json", {"a": {"psnr": 1.0}}),
        "demo": (".davae", {"kind": "demo"}),
    }
    for below, (name, content) in marks.items():
        (photos / below).mkdir()
        picture(9, (40, 40)).save(photos / below / "sheet.png")
        assert len(open_dataset(photos, resolution=32)) == 5
        (photos / below / name).write_text(json.dumps(content), encoding="utf-8")
        assert len(open_dataset(photos, resolution=32)) == 4
        assert len(open_dataset(photos / below, resolution=32)) == 1  # asked for by name
    (photos / "other").mkdir()
    picture(9, (40, 40)).save(photos / "other" / "a.png")
    (photos / "other" / "inspection.json").write_text('{"a": 1, "b": null}', encoding="utf-8")  # somebody else's
    assert len(open_dataset(photos, resolution=32)) == 5


def test_summary_names_twenty() -> None:
    ledger = SkipLedger(100)
    assert ledger.summary() == "no file was skipped"
    ledger.add([("0.png", "why")])
    assert ledger.summary() == "1 file was skipped:\n  0.png: why"
    ledger.add([(f"{i:02d}.png", "why") for i in range(1, 26)])
    lines = ledger.summary().splitlines()
    assert lines[0] == "26 files were skipped:"
    assert len(lines) == 22
    assert lines[-1] == "  and 6 more"


def test_more_than_half_is_an_error_and_half_is_not() -> None:
    ledger = SkipLedger(4)
    ledger.add([("a", "r"), ("b", "r")])
    ledger.check()
    with pytest.raises(DavaeError, match=r"3 of 4 images .* more than half"):
        ledger.add([("c", "r")])
