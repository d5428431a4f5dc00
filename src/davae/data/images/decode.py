"""Decoding of one image file to RGB pixels.

The result is what an image viewer shows: EXIF orientation applied, transparency over white, 16-bit values
scaled (not clipped), palettes and CMYK converted. Files that cannot be read, or are unsafe to read,
raise :class:`UnreadableImage` with a readable reason.
"""

import errno
import io
import os
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from davae.errors import DavaeError

_ROWS = 64  # rows of an image that are converted at a time

Result = TypeVar("Result")
ImageFile = bytes | str | Path | BinaryIO
"""An image's bytes in memory, its path, or an open file."""

MAX_PIXELS = 178_956_970
"""Maximum number of pixels (683 MiB as RGB in Pillow, 4 bytes each): its own limit against decompression bombs."""

MAX_ASPECT = 20
"""Maximum ratio of the longer side to the shorter."""

FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "QOI")
"""Supported formats (JPEG includes MPO). Other formats of Pillow call external programs (EPS) or have no
signature (TGA)."""

# What Pillow's plugins raise on broken files; deliberately without MemoryError.
_BROKEN = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError, AttributeError),
    *(RuntimeError, struct.error, zlib.error),
)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = {  # EXIF orientation -> the transposition that makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(DavaeError):
    """A file that cannot serve as an image.

    Attributes:
        reason: why, without naming the file.
        lasting: whether the file is at fault; otherwise the disk or the network is, and a later try may succeed.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


def check_header(file: ImageFile, *, min_size: int = 1) -> tuple[int, int]:
    """Read an image's header only and return its stored (width, height) in pixels.

    Raises:
        UnreadableImage: not an image, a short side below ``min_size``, or too many pixels or too long a side.
    """
    with _opened(file, min_size) as image:
        return image.size


def upright_size(file: ImageFile, *, min_size: int = 1) -> tuple[int, int]:
    """(width, height) of the image that :func:`decode_image` returns, from the header alone.

    Raises:
        UnreadableImage: as :func:`check_header`.
    """
    with _opened(file, min_size) as image:
        width, height = image.size
        return (height, width) if _orientation(image) >= 5 else (width, height)  # 5 to 8 turn by 90 degrees


def decode_image(file: ImageFile, *, min_size: int = 1) -> Image.Image:
    """Decode an image to upright, opaque RGB.

    * EXIF orientation is applied. An animation gives its first frame.
    * Transparency is composited over white before anything is resized, so hidden colours do not bleed in.
    * 16-bit grey is scaled by 255/65535 and rounded; 16-bit colour keeps its upper 8 bits.
    * CMYK goes through its embedded colour profile if it has one, else through ``(1 - c)(1 - k)``; JPEG's
      inverted CMYK (Adobe) is understood. Profiles of RGB and grey images are ignored, as usual.

    Args:
        file: bytes, a path, or an open binary file.
        min_size: shortest side accepted, in pixels.

    Raises:
        UnreadableImage: as :func:`check_header`, or the file is truncated or damaged, or its grey values exceed
            the known ranges.
    """
    with _opened(file, min_size) as image:
        try:
            image.load()
            rgb = _to_rgb(image)
            # After load: some formats (TIFF, AVIF) turn their pixels themselves and then say so.
            move = _UPRIGHT.get(_orientation(image))
        except UnreadableImage:
            raise
        except _BROKEN as error:
            raise _unreadable(error) from error
    return rgb if move is None else rgb.transpose(move)


@cache
def _formats() -> tuple[str, ...]:
    """Those of :data:`FORMATS` that this Pillow has; some builds lack AVIF."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextmanager
def _opened(file: ImageFile, min_size: int) -> Iterator[Image.Image]:
    """Read an image's header and refuse unusable sizes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is checked below
            image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=_formats())
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"more than {MAX_PIXELS:,} pixels, perhaps a decompression bomb") from error
    except _BROKEN as error:
        raise _unreadable(error) from error
    with image:
        width, height = image.size
        short, long = min(width, height), max(width, height)
        if width * height > MAX_PIXELS:
            raise UnreadableImage(f"{width} x {height}: more than {MAX_PIXELS:,} pixels")
        if short < max(min_size, 1):
            raise UnreadableImage(f"too small: {width} x {height}, the short side needs {min_size} pixels")
        if long > MAX_ASPECT * short:
            raise UnreadableImage(f"{width} x {height}: one side is more than {MAX_ASPECT} times the other")
        yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in {"I", "F"}:
        return _deep_grey_to_rgb(image)
    if image.mode == "CMYK":
        return _cmyk_to_rgb(image)
    transparency = image.info.get("transparency")
    if transparency is None and image.mode in {"1", "L", "RGB", "YCbCr", "HSV"}:
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
    if isinstance(transparency, tuple) and max(transparency) > 255:
        # The transparent colour of a 16-bit PNG; Pillow has reduced the pixels to 8 bits, not this colour.
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    rgb = Image.new("RGB", image.size)
    for box in _strips(image):
        strip = image.crop(box)
        rgba = (strip.convert("LA") if strip.mode == "La" else strip).convert("RGBA")
        rgb.paste(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"), box)
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of a few rows each. What is made on the way to RGB takes up to eight times a picture's bytes."""
    width, height = image.size
    for top in range(0, height, _ROWS):
        yield 0, top, width, min(top + _ROWS, height)


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey with more than 8 bits. Pillow's own conversion clips at 255, which turns such images white."""
    limit = 1.0 if image.mode == "F" else 65535.0
    transparent = image.info.get("transparency")
    rgb = Image.new("RGB", image.size)
    for box in _strips(image):
        values = np.asarray(image.crop(box))  # [rows, W], uint16, int32 or float32
        low, high = float(values.min()), float(values.max())
        if not (low >= 0.0 and high <= limit):  # written so that NaN fails too
            raise UnreadableImage(
                f"grey values from {low:g} to {high:g}; integers must lie in 0..65535, floating point in 0..1"
            )
        grey = np.rint(values.astype(np.float64) * (255.0 / limit)).astype(np.uint8)
        if isinstance(transparent, int):
            grey[values == transparent] = 255  # over white
        rgb.paste(Image.fromarray(grey).convert("RGB"), box)
    return rgb


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if source.profile.xcolor_space == "CMYK":
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert converted is not None  # None only with inPlace
                return converted
        except (OSError, ImageCms.PyCMSError) as error:
            raise UnreadableImage(f"its CMYK colour profile is damaged ({error})") from error
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except _BROKEN:
        return 1  # only the metadata is damaged: viewers show such an image as stored


PAUSES_S = (0.1, 0.5, 2.0, 5.0)
"""Seconds to wait before each further try after a failure of the disk or the network."""

_OF_THE_FILE = {
    *(errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
}


def patiently(read: Callable[[], Result], *, again: bool = True) -> Result:
    """Call ``read``, and again after failures of the disk or the network, for some seconds.

    Args:
        read: opens and reads a file.
        again: whether to try more than once.

    Raises:
        UnreadableImage: the file cannot be used, or could not be read this time; ``lasting`` says which.
    """
    for pause in (*PAUSES_S, None) if again else (None,):
        try:
            return read()
        except UnreadableImage as error:
            if error.lasting or pause is None:
                raise
        except OSError as error:
            found = _unreadable(error, "cannot be opened")
            if found.lasting or pause is None:
                raise found from error
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _unreadable(error: BaseException, what: str = "damaged") -> UnreadableImage:
    """The :class:`UnreadableImage` for an error; only system errors have an ``errno``."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENOENT:  # deleted, or its whole folder is gone with a disk
        name = getattr(error, "filename", None)
        lasting = name is None or Path(os.fsdecode(name)).parent.is_dir()
    else:
        lasting = number is None or number in _OF_THE_FILE
    reason = _reason(error) if number is None or lasting else f"{what} ({os.strerror(number)})"
    return UnreadableImage(reason, lasting=lasting)


def _reason(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image in a known format"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    text = str(error) or type(error).__name__
    return f"truncated ({text})" if "truncated" in text.lower() else f"damaged ({text})"
