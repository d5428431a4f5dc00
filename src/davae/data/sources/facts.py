"""Captions and labels of images, read by one rule from folders, tables and shards."""

import csv
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from davae.data.images.protocol import Skip
from davae.errors import DavaeError
from davae.runtime.text_files import lines_of, open_regular, parse_json, read_text, whole_text

CAPTION_KEYS = ("text", "caption", "captions", "prompt", "txt")
LABEL_KEYS = ("label", "labels", "class", "cls", "fine_label")
CAPTION_ENDINGS = (".txt", ".caption")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Metadata files of image folders, as in ``datasets``; column or key ``file_name`` names the image."""

_MOST_CLASSES = 1_000_000
"""Labels below this are class numbers. Larger ones are identifiers of classes, numbered in increasing order."""


def caption_of(value: Any) -> str:
    """A caption as text: of several the first that is not empty; empty if there is none.

    Truth values and not-a-number, by which tables say that a value is missing, are no text.
    """
    if isinstance(value, list | tuple):
        return next(filter(None, map(caption_of, value)), "")
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return whole_text(str(value)).strip() if isinstance(value, str | int | float) else ""


def caption_in(values: Mapping[str, Any]) -> str:
    """The first caption that is not empty, of all keys or columns that may hold one."""
    return next(filter(None, (caption_of(values.get(key)) for key in CAPTION_KEYS)), "")


def first_of(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first key that has one; ``None`` if none has."""
    return next((values[key] for key in keys if values.get(key) is not None), None)


def class_label(value: Any, where: str) -> int | str | None:
    """One label as a number or a name: whole numbers in any spelling are numbers; -1 and empty values mean no class.

    Args:
        value: as it is in a table, a JSON object or a text file.
        where: its place, for the error.

    Raises:
        DavaeError: a fraction, a number below -1, or a value of another type.
    """
    if isinstance(value, str):
        value = unicodedata.normalize("NFC", whole_text(value).strip())
        if re.fullmatch(r"-?[0-9]{1,18}", value):
            value = int(value)
        elif not value:
            return None
        else:
            return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        return class_label(value.decode(errors="replace"), where)
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if not isinstance(value, int) or value < -1:
        raise DavaeError(f"{where}: the label {value!r} is neither a class number nor a name; -1 means no class")
    return None if value == -1 else int(value)


def class_names(labels: Iterable[int | str | None], where: str) -> tuple[list[str], dict[int | str, int]]:
    """Names of the classes, and the class number of each label.

    If all numbers are below a million, they are class numbers already; otherwise, and for names, classes are numbered
    in sorted order.

    Raises:
        DavaeError: numbers and names are mixed.
    """
    found = {label for label in labels if label is not None}
    numbers = sorted(label for label in found if isinstance(label, int))
    names = sorted(label for label in found if isinstance(label, str))
    if numbers and names:
        raise DavaeError(
            f"{where}: some labels are numbers ({numbers[0]}), others names ('{names[0]}'); give all of one kind"
        )
    if numbers and numbers[-1] < _MOST_CLASSES:
        return [str(number) for number in range(numbers[-1] + 1)], {number: number for number in numbers}
    ordered: list[int | str] = [*numbers, *names]
    return [str(label) for label in ordered], {label: number for number, label in enumerate(ordered)}


def caption_files(image: str) -> list[str]:
    """Lower-case names of an image's possible caption files: ``a.txt``, ``a.caption``, ``a.jpg.txt``."""
    stem = os.path.splitext(image)[0]
    return [(base + ending).lower() for ending in CAPTION_ENDINGS for base in (stem, image)]


def metadata_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a metadata file, each with its place for errors.

    Raises:
        DavaeError: the file cannot be read, or a row has no ``file_name``.
    """
    for where, row in {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[file.suffix.lower()](file):
        if not isinstance(row, dict):
            raise DavaeError(f"{where}, must be an object with 'file_name' and 'text'")
        if not isinstance(row.get("file_name"), str):
            known = ", ".join(map(repr, list(row)[:5])) or "nothing"
            raise DavaeError(f"{where}: no 'file_name'; it has {known}")
        yield where, row


def match_rows(
    files: Sequence[Path], root: Path, known: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[Skip]]:
    """Match the rows of metadata files with images.

    A name is resolved from the metadata file's folder, then from the folders above it if the path leads back into it;
    an absolute name, perhaps of another machine, by its longest suffix that exists. Backslashes and other Unicode
    compositions of accents are supported. If several rows name one image, the first value of each key counts.

    Args:
        files: metadata files in or above ``root``.
        root: the folder of the images.
        known: their paths below it, with forward slashes.

    Returns:
        Rows by image; the number of matched rows of each file; names of unmatched rows, with the reason.
    """
    paths = {_plain(os.path.join(root, name)): name for name in known}
    rows: dict[str, dict[str, Any]] = {}
    counts: dict[str, Any] = {}
    unmatched: list[Skip] = []
    for file in files:
        counts[str(file)] = 0
        found = [row for _, row in metadata_rows(file)]
        folders = {os.path.dirname(row["file_name"].replace("\\", "/")) for row in found}
        for row in found:
            asked = row["file_name"].strip()
            for path in _places(asked, file.parent, shortest=1 if len(folders) == 1 else 2):
                if _plain(path) in paths:
                    known_of = rows.setdefault(paths[_plain(path)], {})
                    known_of |= {key: value for key, value in row.items() if not _says(known_of.get(key))}
                    counts[str(file)] += 1
                    break
                if asked and os.path.lexists(path):  # in another split, or not an image
                    break
            else:
                folder = os.path.relpath(file.parent, root).replace(os.sep, "/")
                name = asked if folder == "." or os.path.isabs(asked) else f"{folder}/{asked}"
                unmatched.append((name, f"named in {file.name} but not there"))
    return rows, counts, unmatched


def _says(value: Any) -> bool:
    return value is not None and value not in ("", []) and value == value


def _places(name: str, folder: Path, shortest: int) -> Iterator[str]:
    """Absolute paths that a name in a metadata file of ``folder`` may mean, the likeliest first.

    ``shortest`` is the minimum number of parts of an absolute name's suffix; one part would not distinguish
    ``cat/1.png`` from ``dog/1.png``.
    """
    folder = folder.absolute()
    inside = f"{folder}{os.sep}"
    for spelled in dict.fromkeys((name, name.replace("\\", "/"))):
        parts = [part for part in spelled.split("/") if part not in ("", ".")]
        ends = [parts]
        if spelled.startswith("/") or re.match(r"[A-Za-z]:/", spelled):
            yield os.path.normpath(spelled)
            ends = [parts[first:] for first in range(len(parts) - shortest + 1)]
        else:
            yield os.path.normpath(os.path.join(folder, *parts))
        for end in ends:
            for above in (folder, *folder.parents[:3]):
                path = os.path.normpath(os.path.join(above, *end))
                if path.startswith(inside):
                    yield path


def _plain(path: str) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(os.path.abspath(path)))


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines_of(read_text(file)), start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, parse_json(line, where)


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        for row in (reader := csv.DictReader(io.StringIO(read_text(file), newline=""), strict=True)):
            yield f"{file}, line {reader.line_num}", {(key or "").strip(): value for key, value in row.items()}
    except csv.Error as error:
        raise DavaeError(f"{file} is no table in CSV: {error}") from error


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    try:
        open_regular(file).close()  # refuses pipes, which would block
        table = pyarrow.parquet.ParquetFile(file)
        wanted = [n for n in table.schema_arrow.names if n in {"file_name", *CAPTION_KEYS, *LABEL_KEYS}]
        number = 0
        for batch in table.iter_batches(batch_size=4096, columns=wanted):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DavaeError(f"{file} cannot be read as a table: {error}") from error
