"""Pixel values of awkward files, by hand-worked numbers."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from davae.data import UnreadableImage, check_header, decode_image
from davae.data.images.decode import MAX_PIXELS
from tests.data.files import (
    GREY,
    GREY_ALPHA,
    RGB,
    RGB_ALPHA,
    deep_png,
    encoded,
    picture,
    truncated_jpeg,
)


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_16_bit_grey_is_scaled_and_rounded_not_clipped() -> None:
    # 32768 * 255 / 65535 = 127.50195 -> 128; 300 -> 1.167 -> 1; a clip at 255 would give 255 for all but one.
    values = np.array([[0, 300, 32768, 65535]], dtype=np.uint16)
    found = pixels(deep_png(np.repeat(values, 2, axis=0), GREY))
    assert found[0, :, 0].tolist() == [0, 1, 128, 255]
    assert (found == found[..., :1]).all()


def test_16_bit_colour_and_alpha() -> None:
    colour = np.array([[[0xFF00, 0x8000, 0x0100], [0, 0x4040, 0xFFFF]]] * 2, dtype=np.uint16)
    assert pixels(deep_png(colour, RGB))[0].tolist() == [[255, 128, 1], [0, 64, 255]]
    half = np.array([[[0, 0, 0, 0x8080]] * 2] * 2, dtype=np.uint16)  # black, alpha 128/255: over white 127
    assert pixels(deep_png(half, RGB_ALPHA))[0, 0].tolist() == [127, 127, 127]
    grey = np.array([[[0xFFFF, 0xFFFF], [0x1010, 0]]] * 2, dtype=np.uint16)
    assert pixels(deep_png(grey, GREY_ALPHA))[0].tolist() == [[255] * 3, [255] * 3]


def test_16_bit_transparent_colours_become_white() -> None:
    grey = np.array([[1000, 2000]] * 2, dtype=np.uint16)
    assert pixels(deep_png(grey, GREY, struct.pack(">H", 2000)))[0].tolist() == [[4] * 3, [255] * 3]
    colour = np.array([[[0x1000, 0x2000, 0x3000], [0x4000, 0, 0]]] * 2, dtype=np.uint16)
    found = pixels(deep_png(colour, RGB, struct.pack(">HHH", 0x1000, 0x2000, 0x3000)))
    assert found[0].tolist() == [[255, 255, 255], [0x40, 0, 0]]


def test_deep_tiffs() -> None:
    def tiff(values: np.ndarray) -> bytes:
        return encoded(Image.fromarray(values), "TIFF")

    assert pixels(tiff(np.full((2, 2), 32768, dtype=np.int32)))[0, 0].tolist() == [128] * 3
    assert pixels(tiff(np.full((2, 2), 0.2, dtype=np.float32)))[0, 0].tolist() == [51] * 3
    for bad in (np.int32(70_000), np.int32(-1), np.float32(np.nan), np.float32(2.0)):
        with pytest.raises(UnreadableImage, match="grey values from"):
            decode_image(tiff(np.full((2, 2), bad)))


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 90, 200), (30, 160, 60), (128, 128, 128)])
def test_cmyk_jpeg(colour: tuple[int, int, int]) -> None:
    """Colours survive RGB -> CMYK JPEG (Adobe: stored inverted) -> RGB."""
    image = Image.new("RGB", (32, 32), colour).convert("CMYK")
    data = encoded(image, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in data
    assert np.abs(pixels(data).astype(int) - np.array(colour)).max() <= 2


def test_cmyk_black_channel() -> None:
    # (1 - c)(1 - k): c = 0, k = 0.4 -> 153 in red; m = 0.5 -> 76.5 in green; y = 1 -> 0 in blue.
    data = encoded(Image.new("CMYK", (16, 16), (0, 128, 255, 102)), "TIFF")
    assert np.abs(pixels(data)[0, 0].astype(int) - [153, 76, 0]).max() <= 1


def cmyk_profile() -> bytes:
    """A minimal ICC profile in which ink does the unexpected: no cyan is dark, full cyan is white."""

    def lut() -> bytes:
        identity = [65536, 0, 0, 0, 65536, 0, 0, 0, 65536]
        head = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *identity)
        ramp = bytes(range(256))
        # 2^4 grid points, cyan slowest; Lab of 8 bits: L in 0..255, a and b neutral at 128.
        grid = b"".join(bytes([255 if i & 8 else 0, 128, 128]) for i in range(16))
        return head + ramp * 4 + grid + ramp * 3

    def text(kind: bytes, body: bytes) -> bytes:
        return kind + b"\0\0\0\0" + body

    tags = {
        b"desc": text(b"desc", struct.pack(">I", 5) + b"test\0" + b"\0" * 78),
        b"cprt": text(b"text", b"none\0"),
        b"wtpt": text(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061)),
        b"A2B0": lut(),
    }
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI", size, b"lcms", 0x02400000) + b"prtrCMYKLab " + b"\0" * 12 + b"acsp"
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def test_cmyk_follows_its_profile() -> None:
    profile = cmyk_profile()
    for cyan, expected in ((255, 255), (0, 0)):
        data = encoded(Image.new("CMYK", (16, 16), (cyan, 0, 0, 0)), "JPEG", quality=100, icc_profile=profile)
        assert np.abs(pixels(data)[8, 8].astype(int) - expected).max() <= 3
    broken = encoded(Image.new("CMYK", (16, 16)), "JPEG", icc_profile=profile[:150])
    with pytest.raises(UnreadableImage, match="colour profile"):
        decode_image(broken)


def test_transparency_shows_white_and_hides_the_colour_below() -> None:
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 255, 51))  # a fifth of blue: 255 * 0.8 = 204
    found = pixels(encoded(image, "PNG"))
    assert found[0].tolist() == [[255, 255, 255], [204, 204, 255]]
    assert pixels(encoded(Image.new("LA", (2, 2), (0, 51)), "PNG"))[0, 0].tolist() == [204] * 3


def test_palette_with_and_without_transparency() -> None:
    image = Image.new("P", (3, 2))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for x in range(3):
        for y in range(2):
            image.putpixel((x, y), x)
    plain = pixels(encoded(image, "PNG"))
    assert plain[0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    by_index = pixels(encoded(image, "PNG", transparency=1))
    assert by_index[0].tolist() == [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    by_table = pixels(encoded(image, "PNG", transparency=bytes([255, 0, 51])))
    assert by_table[0].tolist() == [[10, 20, 30], [255, 255, 255], [218, 220, 222]]
    assert pixels(encoded(image, "GIF", transparency=2))[0, 2].tolist() == [255, 255, 255]


def test_grey_and_bilevel() -> None:
    assert pixels(encoded(Image.new("L", (2, 2), 77), "PNG"))[0, 0].tolist() == [77] * 3
    assert pixels(encoded(Image.new("1", (2, 2), 1), "PNG"))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int, kind: str) -> None:
    """The corners of the upright picture are found again, for each of the eight ways to store it."""
    upright = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    stored = {  # the definition: where row 0 and column 0 of what is stored lie in the picture
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored[orientation])).convert("RGB")
    data = encoded(image, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert pixels(data)[..., 0].tolist() == upright.tolist()


def test_damaged_exif_leaves_the_picture_readable() -> None:
    data = encoded(Image.new("RGB", (8, 8), (9, 9, 9)), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pixels(data)[0, 0].tolist() == [9, 9, 9]


def test_unreadable_files_say_why(tmp_path: Path) -> None:
    whole_png = encoded(picture(0), "PNG")
    cases = {
        b"a shopping list": "not an image",
        b"": "not an image",
        truncated_jpeg(): "truncated",
        whole_png[: len(whole_png) // 2]: "truncated",
        whole_png[:200] + b"\0" * 40 + whole_png[240:]: "damaged|truncated",
    }
    for data, reason in cases.items():
        with pytest.raises(UnreadableImage, match=reason):
            decode_image(data)
    with pytest.raises(UnreadableImage, match="no such file"):
        decode_image(tmp_path / "absent.png")
    with pytest.raises(UnreadableImage, match="too small: 1 x 1"):
        check_header(encoded(Image.new("RGB", (1, 1)), "PNG"), min_size=2)


def test_formats_that_call_other_programs_are_not_opened() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n"
    with pytest.raises(UnreadableImage, match="not an image"):
        decode_image(postscript)


def test_bombs_and_ribbons_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def claims(width: int, height: int) -> bytes:
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
        body = b"IHDR" + header
        start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
        return start + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a large photograph must not warn either
        for width, height in ((60_000, 60_000), (MAX_PIXELS // 10_000 + 1, 10_000)):
            with pytest.raises(UnreadableImage, match="pixels"):
                decode_image(claims(width, height))
        assert check_header(claims(12_000, 9_000)) == (12_000, 9_000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other libraries do; the limit here stays
    with pytest.raises(UnreadableImage, match="more than"):
        check_header(claims(60_000, 60_000))
    with pytest.raises(UnreadableImage, match="20 times"):
        check_header(claims(21_000, 1_000))


@pytest.mark.parametrize("mode", ["P", "LA", "RGBA"])
def test_transparency_is_resolved_a_few_rows_at_a_time(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file may hold many pixels: whole copies in RGBA would take gigabytes."""
    random = np.random.default_rng(0)
    shape = (300, 40) if mode == "P" else (300, 40, len(mode))
    image = Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), "L" if mode == "P" else mode)
    if mode == "P":
        image = image.convert("P")
    file = encoded(image, "PNG", **({"transparency": 7} if mode == "P" else {}))
    rgba = Image.open(io.BytesIO(file)).convert("RGBA")
    expected = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    composite, rows = Image.alpha_composite, []

    def counted(below: Image.Image, above: Image.Image) -> Image.Image:
        rows.append(above.height)
        return composite(below, above)

    monkeypatch.setattr(Image, "alpha_composite", counted)
    assert np.array_equal(np.asarray(decode_image(file)), np.asarray(expected))
    assert sum(rows) == 300
    assert max(rows) <= 64
