"""Builds the awkward image files that people's folders hold."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

GREY, RGB, GREY_ALPHA, RGB_ALPHA = 0, 2, 4, 6  # colour types of the PNG specification


def deep_png(values: np.ndarray, colour: int, transparent: bytes | None = None) -> bytes:
    """A 16-bit PNG of uint16 ``[H, W]`` or ``[H, W, C]``, which Pillow cannot write for colour."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header)]
    if transparent is not None:
        parts.append(chunk(b"tRNS", transparent))
    parts += [chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image in a file format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A smooth coloured picture of (width, height), another for every seed."""
    width, height = size
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def image_folder(root: Path, classes: dict[str, int], suffix: str = ".png") -> Path:
    """``root/<class>/<n>.png`` with as many pictures a class as given."""
    seed = 0
    for name, count in classes.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(seed).save(folder / f"{i:03d}{suffix}")
            seed += 1
    return root


def truncated_jpeg() -> bytes:
    """A JPEG with a whole header and half of its pixels."""
    data = encoded(picture(0, (200, 200)), "JPEG", quality=95)
    return data[: len(data) // 2]
