"""Reading text from outside: captions, tables of captions, prompts, JSON.

The encoding is UTF-8, or what a byte-order mark says (UTF-8, UTF-16 or UTF-32, as Windows' Notepad writes them). Only a
newline, optionally after a carriage return, ends a line; other Unicode separators are part of the text.
"""

import codecs
import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from davae.errors import DavaeError

MOST_BYTES = 1 << 30
"""Default limit of a file; captions have the lower one below."""

CAPTION_BYTES = 1 << 20
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading bytes; a pipe or a device could block or never end.

    Raises:
        DavaeError: it is a pipe, a device or a socket.
        OSError: it cannot be opened, or is a folder.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        if os.path.isdir(path):
            raise IsADirectoryError(21, os.strerror(21), str(path))
        raise DavaeError(f"{path} is a pipe or a device, not a file")
    return os.fdopen(descriptor, "rb")


def read_text(path: str | Path, *, most_bytes: int = MOST_BYTES) -> str:
    """The text of a file.

    Raises:
        DavaeError: not a regular file, longer than ``most_bytes``, or not text in a known encoding.
        OSError: it is absent or cannot be read.
    """
    with open_regular(path) as file:
        raw = file.read(most_bytes + 1)
    return decode_text(raw, str(path), most_bytes=most_bytes)


def decode_text(raw: bytes, name: str, *, most_bytes: int = CAPTION_BYTES) -> str:
    """Decode bytes by their byte-order mark, or as UTF-8.

    Args:
        raw: the bytes.
        name: of their file, for the error.
        most_bytes: maximum length.

    Raises:
        DavaeError: more bytes than that, or not text in the encoding.
    """
    if len(raw) > most_bytes:
        raise DavaeError(f"{name} is too long for text of its kind: more than {most_bytes:,} bytes")
    encoding = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), None)
    if encoding is None and b"\0" in raw:
        raise DavaeError(
            f"{name} is not UTF-8 text (it holds zero bytes, as UTF-16 without its mark does): save it as UTF-8"
        )
    try:
        return raw.decode(encoding or "utf-8")
    except UnicodeDecodeError as error:
        raise DavaeError(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def lines_of(text: str) -> list[str]:
    """The lines, without their line endings."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(text: str, where: str) -> Any:
    """The value of JSON text; its strings can be encoded (:func:`whole_text`).

    Args:
        text: the JSON.
        where: file and line, for the error.

    Raises:
        DavaeError: it is not JSON, nested too deeply, or has a number with too many digits.
    """
    try:
        value = json.loads(text, strict=False)  # control characters may stand in captions as they are
        return _whole(value) if _SURROGATE.search(text) else value
    except (ValueError, RecursionError) as error:  # ValueError: also integers of too many digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DavaeError(f"{where} is not JSON: {reason}") from error


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {whole_text(key): _whole(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_whole(entry) for entry in value]
    return whole_text(value) if isinstance(value, str) else value


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        DavaeError: it is absent, cannot be read as text (:func:`read_text`), or is not JSON.
    """
    try:
        text = read_text(path, most_bytes=MOST_BYTES)
    except OSError as error:
        raise DavaeError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(text, str(path))


def plain_json(text: str | bytes) -> Any:
    """``json.loads``; JSON that is nested too deeply is a :class:`ValueError` like other damage."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(path: str | Path) -> dict[str, Any]:
    """The object that a JSON file holds, such as a configuration.

    Raises:
        DavaeError: as :func:`read_json`, or it holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise DavaeError(f"{path} holds no JSON object but a {type(found).__name__}")
    return found


def whole_text(text: str) -> str:
    """Text that can be encoded: surrogate pairs are joined, and lone surrogates become U+FFFD.

    JSON may contain lone surrogates (``"\\ud800"``), and so may file names that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def whole_name(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 are escaped (``caf\\xe9.png``), so that names stay distinct."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name
