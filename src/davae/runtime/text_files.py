"""Text from outside: captions, tables of captions, prompts, configurations. One reader for all of it.

The encoding is UTF-8, or what a byte-order mark says (UTF-8, UTF-16, UTF-32: Windows' Notepad writes them). A line
ends with a newline, with or without a carriage return, and with nothing else: other separators of Unicode belong to
the text.
"""

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from davae.errors import DavaeError

MOST_BYTES = 1 << 30
"""Of a file with many lines; a caption or a configuration has a limit of its own."""

CAPTION_BYTES = 1 << 20
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_regular(path: str | Path) -> BinaryIO:
    """A file open for reading its bytes. A pipe or a device, which may wait or give for ever, is refused.

    Raises:
        DavaeError: it is no regular file.
        OSError: as ``open``.
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
        DavaeError: it is no regular file, longer than ``most_bytes``, or no text in a known encoding.
        OSError: it is not there or cannot be read.
    """
    with open_regular(path) as file:
        raw = file.read(most_bytes + 1)
    return decode_text(raw, str(path), most_bytes=most_bytes)


def decode_text(raw: bytes, name: str, *, most_bytes: int = CAPTION_BYTES) -> str:
    """Bytes as text.

    Args:
        raw: the bytes.
        name: of their file, for the error.
        most_bytes: a text has.

    Raises:
        DavaeError: more bytes, or no text in a known encoding.
    """
    if len(raw) > most_bytes:
        raise DavaeError(f"{name} is too long for a text of its kind: more than {most_bytes:,} bytes")
    encoding = next((encoding for mark, encoding in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise DavaeError(
            f"{name} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error


def lines_of(text: str) -> list[str]:
    """The lines, without their ends."""
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(text: str, where: str) -> Any:
    """What JSON text says.

    Args:
        text: as read.
        where: file and line, for the error.

    Raises:
        DavaeError: it is not JSON, or too deep.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # bad JSON, numbers without end, deep nesting
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DavaeError(f"{where}, is not JSON: {reason}") from error


def read_json(path: str | Path) -> Any:
    """What a JSON file says.

    Raises:
        DavaeError: as :func:`read_text`, or it is not JSON, or is not there.
    """
    try:
        text = read_text(path, most_bytes=MOST_BYTES)
    except OSError as error:
        raise DavaeError(f"{path} cannot be read: {error.strerror or error}") from error
    return parse_json(text, str(path))


def whole_text(text: str) -> str:
    """Text that can be written in any encoding: halves of a character that stand alone become U+FFFD.

    JSON may hold them (``"\\ud800"``), and so may names of files that are not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def whole_name(name: str) -> str:
    """A file's name as text; bytes that are not UTF-8 are spelled out (``caf\\xe9.png``), so that no two names meet."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return name
