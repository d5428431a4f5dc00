"""A folder as people have them: training runs, and its end names what was skipped."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from davae.data import render_scene
from davae.errors import DavaeError
from davae.recipes.read import load_recipe
from davae.training.runs.train import train_autoencoder


def _photo(index):
    return Image.fromarray(render_scene(index % 12, index, 48))


def _bomb():
    """A PNG of some hundred bytes that says it is 60,000 pixels wide and high."""
    start = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    parts = [start, b"IDAT" + zlib.compress(b"\0" * 1000), b"IEND"]
    chunks = (struct.pack(">I", len(p) - 4) + p + struct.pack(">I", zlib.crc32(p)) for p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def folder(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(12):
        _photo(i).save(photos / f"good-{i}.png")
    whole = io.BytesIO()
    _photo(20).save(whole, "JPEG")
    (photos / "truncated.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    (photos / "text.png").write_text("this is no picture")
    Image.new("RGB", (1, 1)).save(photos / "dot.png")
    Image.fromarray(np.full((48, 48), np.nan, np.float32)).save(photos / "nan.tiff")
    (photos / "bomb.png").write_bytes(_bomb())
    _photo(21).convert("CMYK").save(photos / "print.jpg")
    grey = (np.asarray(_photo(22).convert("L")).astype(np.uint16)) * 257
    Image.fromarray(grey).save(photos / "sixteen-bit.png")
    return photos


def _recipe(folder):
    return load_recipe("debug", [f"data.path={folder}", "autoencoder.loop.steps=4", "data.hold_out=2"])


def test_training_runs_and_names_what_it_skipped(folder, tmp_path, caplog):
    result = train_autoencoder(_recipe(folder), tmp_path / "run")
    assert {name for name, _ in result.skipped.entries} == {
        "truncated.jpg",
        "text.png",
        "dot.png",
        "nan.tiff",
        "bomb.png",
    }
    reasons = dict(result.skipped.entries)
    assert "decompression bomb" in reasons["bomb.png"]
    assert "nan" in reasons["nan.tiff"]
    message = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
    assert any(all(name in text for name in ("truncated.jpg", "text.png", "dot.png")) for text in message)


def test_mostly_bad_files_are_an_error(folder, tmp_path):
    for i in range(20):
        (folder / f"bad-{i}.png").write_text("no picture")
    with pytest.raises(DavaeError, match="more than half"):
        train_autoencoder(_recipe(folder), tmp_path / "run")
