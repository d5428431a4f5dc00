"""Captions and labels of images, read by one rule from folders, tables and shards."""

import csv
import io
import logging
import math
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from davae.data.images.protocol import Skip
from davae.data.sources.parquet import open_parquet, rows_of
from davae.errors import DavaeError
from davae.runtime.console import shown
from davae.runtime.text_files import decode_text, lines_of, parse_json, read_text, whole_text

logger = logging.getLogger(__name__)

CAPTION_KEYS = ("text", "caption", "captions", "prompt", "txt")
LABEL_KEYS = ("label", "labels", "class", "cls", "fine_label")
"""Names of keys and columns, in any case (``TEXT``); the first of those that hold something counts."""

TEXT_ENDINGS = (".txt", ".caption", ".cls", ".json")
"""Of texts beside images, in lower case: two of captions, one of labels, one of both; the first that says so counts."""

METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Metadata files of image folders, as in ``datasets``; column or key ``file_name`` names the image."""

NO_CLASS = "%s: column '%s' holds lists or structures, not one class an image; images are taken without a class by it"
"""Log line of such labels."""


class WrongLabel(DavaeError):
    """A label that is neither a class number nor a name."""


_FILE_KEYS = ("file_name", "filename")
_MOST_CLASSES = 1_000_000
"""Labels below this are class numbers. Larger ones are identifiers of classes, numbered in increasing order."""


def caption_of(value: Any) -> str:
    """A caption as text: of several the first that is not empty; empty if there is none.

    Truth values and not-a-number, by which tables say that a value is missing, are no text.

    Raises:
        DavaeError: bytes that are not text.
    """
    if isinstance(value, list | tuple):
        return next(filter(None, map(caption_of, value)), "")
    if isinstance(value, bytes):
        value = decode_text(value, "the caption")
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return whole_text(str(value)).strip().strip("\ufeff").strip() if isinstance(value, str | int | float) else ""


def named(names: Iterable[str], keys: Sequence[str]) -> list[str]:
    """Those of the names that are one of ``keys`` in any case, in the order of the keys."""
    folded = [(name.strip().lower(), name) for name in names]
    return [name for key in keys for fold, name in folded if fold == key]


def caption_in(values: Mapping[str, Any]) -> str:
    """The caption in a row of a table or an object in JSON: the first that is not empty under the usual keys.

    Raises:
        DavaeError: bytes that are not text.
    """
    return caption_of([values[name] for name in named(values, CAPTION_KEYS)])


def label_in(values: Mapping[str, Any], where: str, told: set[str]) -> int | str | None:
    """The label in a row or an object: the first under the usual keys that is there.

    Args:
        values: the row.
        where: for messages.
        told: keys of lists that were logged already; such a key is logged once, and holds no class.

    Raises:
        DavaeError: as :func:`class_label`.
    """
    for name in named(values, LABEL_KEYS):
        if isinstance(values[name], list | tuple | dict):
            if name not in told:
                told.add(name)
                logger.warning(NO_CLASS, shown(where), shown(name))
        elif _says(values[name]):
            return class_label(values[name], f"{where}, '{name}'")
    return None


def facts_in(text: str, name: str, where: str, told: set[str]) -> tuple[int | str | None, str]:
    """Label and caption in a text beside an image; what it is says its ``name``'s ending, one of ``TEXT_ENDINGS``.

    Raises:
        WrongLabel: as :func:`class_label`.
        DavaeError: a ``.json`` that holds no object.
    """
    ending = os.path.splitext(name)[1].lower()
    if ending == ".cls":
        return class_label(text, where), ""
    if ending != ".json":
        return None, caption_of(text)
    values = parse_json(text, where)
    if not isinstance(values, dict):
        raise DavaeError(f"{where} is no JSON object with 'text' or 'label'")
    return label_in(values, where, told), caption_in(values)


def class_label(value: Any, where: str) -> int | str | None:
    """One label as a number or a name: whole numbers in any spelling are numbers; -1 and empty values mean no class.

    Args:
        value: as it is in a table, a JSON object or a text file.
        where: its place, for the error.

    Raises:
        WrongLabel: a fraction, a number below -1, or a value of another type.
    """
    if isinstance(value, str):
        value = unicodedata.normalize("NFC", whole_text(value).strip())
        if re.fullmatch(r"[+-]?[0-9]{1,18}(\.0*)?", value):
            value = int(value.partition(".")[0])
        elif re.fullmatch(r"[+-]?[0-9]*\.[0-9]+", value):
            value = float(value)
        elif not value:
            return None
        else:
            return value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, bytes):
        return class_label(decode_text(value, where), where)
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value):
        value = int(value)
    if not isinstance(value, int) or value < -1:
        raise WrongLabel(f"{where}: the label {value!r} is neither a class number nor a name; -1 means no class")
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


def folded(name: str) -> str:
    """A name by which files are the same where systems differ: accents composed, in lower case."""
    return unicodedata.normalize("NFC", name).lower()


def texts_beside(images: Mapping[str, Sequence[str]], texts: Collection[str]) -> dict[str, list[str]]:
    """The texts beside each image that has any, those that count first at the beginning.

    For each image the names of its texts are given without an ending, such as ``a`` and ``a.jpg``. Accents, and case,
    may be others than the image's where only one spelling of a name can be meant.
    """
    there: dict[str, str] = {}
    for text in sorted(texts, reverse=True):  # a.txt before a.TXT
        name, ending = os.path.splitext(text)
        there.setdefault(name + ending.lower(), text)
    found: dict[str, list[str]] = {}
    for image, names in images.items():
        own = [there[name + end] for end in TEXT_ENDINGS for name in names if name + end in there]
        if own:
            found[image] = own
    used = {text for own in found.values() for text in own}
    left = {folded(text): text for text in there.values() if text not in used}
    loose: dict[str, dict[str, list[str]]] = {}
    for image, names in images.items() if left else ():
        for name in names:
            for text in filter(None, (left.get(folded(name + end)) for end in TEXT_ENDINGS)):
                loose.setdefault(text, {}).setdefault(name, []).append(image)
    for text, meant in loose.items():
        for image in next(iter(meant.values())) if len(meant) == 1 else ():
            found.setdefault(image, []).append(text)
            found[image].sort(key=lambda text: TEXT_ENDINGS.index(os.path.splitext(text)[1].lower()))
    return found


def metadata_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The image that each row of a metadata file names, and the row.

    Raises:
        DavaeError: the file cannot be read, or a row has no ``file_name``.
    """
    for where, row in {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}[file.suffix.lower()](file):
        if not isinstance(row, dict):
            raise DavaeError(f"{where}, must be an object with 'file_name' and 'text'")
        found = [row[key] for key in named(filter(None, row), _FILE_KEYS)]
        asked = decode_text(found[0], where) if found and isinstance(found[0], bytes) else next(iter(found), None)
        if not isinstance(asked, str):
            known = ", ".join(map(repr, list(row)[:5])) or "nothing"
            raise DavaeError(f"{where}: no 'file_name'; it has {known}")
        yield asked.strip(), row


def match_rows(
    files: Sequence[Path], root: Path, known: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, Any], list[Skip]]:
    """Match the rows of metadata files with images.

    A name is resolved from the metadata file's folder, then from the folders above it if the path leads back into it;
    an absolute name, perhaps of another machine, by its longest suffix that exists. Backslashes, other Unicode
    compositions of accents and, if only one image can be meant, another case (``1.JPG``) are supported. If several rows
    name one image, the first value of each key counts.

    Args:
        files: metadata files in or above ``root``.
        root: the folder of the images.
        known: their paths below it, with forward slashes.

    Returns:
        Rows by image; the number of matched rows of each file; names of unmatched rows, with the reason.
    """
    paths = {_plain(os.path.join(root, name)): name for name in known}
    in_any_case: dict[str, str] = {}
    for path, name in paths.items():
        in_any_case[folded(path)] = "" if folded(path) in in_any_case else name
    rows: dict[str, dict[str, Any]] = {}
    counts: dict[str, Any] = {}
    unmatched: list[Skip] = []
    for file in files:
        counts[str(file)] = 0
        found = list(metadata_rows(file))
        folders = {os.path.dirname(asked.replace("\\", "/")) for asked, _ in found}
        for asked, row in found:
            for path in _places(asked, file.parent, shortest=1 if len(folders) == 1 else 2):
                there = bool(asked) and os.path.lexists(path)  # perhaps in another split, or not an image
                name = paths.get(_plain(path)) or ("" if there else in_any_case.get(folded(path), ""))
                if name:
                    known_of = rows.setdefault(name, {})
                    known_of |= {key: value for key, value in row.items() if not _says(known_of.get(key))}
                    counts[str(file)] += 1
                if name or there:
                    break
            else:
                folder = os.path.relpath(file.parent, root).replace(os.sep, "/")
                asked = asked if folder == "." or os.path.isabs(asked) else f"{folder}/{asked}"
                unmatched.append((asked, f"named in {file.name} but not there"))
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
    import pyarrow

    try:
        table = open_parquet(file)
        wanted = named(table.schema_arrow.names, (*_FILE_KEYS, *CAPTION_KEYS, *LABEL_KEYS))
        number = 0
        for batch in table.iter_batches(batch_size=4096, columns=wanted):
            for row in rows_of(batch):
                number += 1
                yield f"{file}, row {number}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DavaeError(f"{file} cannot be read as a table: {error}") from error
