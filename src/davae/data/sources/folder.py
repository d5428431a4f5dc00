"""A folder of images, at any depth: class from the parent folder, caption from a text file beside."""

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from davae.data.images.dataset import Facts
from davae.data.images.decode import UnreadableImage
from davae.data.images.protocol import Skip
from davae.errors import DavaeError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".png", ".apng", ".webp", ".avif"}
    | {".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".qoi"}
)
"""Endings (in lower case) that make a file a candidate; other files are none of our business."""

_SPLIT_NAMES = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
)


_RUN_OR_CACHE = ({"config.yaml", "environment.json"}, {"fingerprint.json", "index.jsonl"})


class FolderSource:
    """Images below a folder, sorted by path.

    * The class is the name of the parent folder, where images lie in more than one folder. Images directly in
      the folder itself then have no class (label -1).
    * The caption is in a UTF-8 file of the same name ending in ``.txt``, or under ``text`` (``caption``) in a
      ``metadata.jsonl`` whose ``file_name`` is relative to its own place (Hugging Face image folders).
    * Where the first level holds nothing but splits (``train``, ``validation``, ...), ``split`` chooses one.

    Hidden files and folders are passed over.

    Args:
        root: the folder.
        split: a folder name of the first level, where that level is made of splits.

    Raises:
        DavaeError: no such folder or split, no image in it, or a damaged ``metadata.jsonl``.
    """

    commit: str | None = None

    def __init__(self, root: str | Path, split: str | None = "train") -> None:
        self.root = _split_folder(Path(root), split)
        self.name = str(self.root)
        self.problems: list[Skip] = []
        found, metadata = _walk(self.root)
        self._files = sorted(found)
        if not self._files:
            raise DavaeError(
                f"no images in {self.root}: looked in it and below for files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self._captions = self._read_metadata(metadata)
        parents = [Path(f).parent for f in self._files]
        names = sorted({p.name for p in parents if p.name})
        self.classes = names if len({p.name for p in parents}) > 1 else []
        numbers = {name: i for i, name in enumerate(self.classes)}
        self._labels = [numbers.get(p.name, -1) for p in parents]

    def __len__(self) -> int:
        return len(self._files)

    def id(self, index: int) -> str:
        """The image's path below the folder, with forward slashes."""
        return self._files[index]

    def open(self, index: int) -> BinaryIO:
        """The image file."""
        return (self.root / self._files[index]).open("rb")

    def stamp(self, index: int) -> str:
        """The file's size in bytes and time of change in nanoseconds."""
        return file_stamp(self.root / self._files[index])

    def facts(self, index: int) -> Facts:
        """The parent folder's class and the caption, from ``metadata.jsonl`` first, then the text file."""
        name = self._files[index]
        caption = self._captions.get(name)
        if caption is None:
            beside = (self.root / name).with_suffix(".txt")
            try:
                caption = beside.read_text(encoding="utf-8-sig").strip()
            except (FileNotFoundError, IsADirectoryError):
                caption = ""
            except (OSError, UnicodeDecodeError) as error:
                raise UnreadableImage(f"its caption {beside.name} cannot be read ({error})") from error
        return Facts(self._labels[index], caption)

    def _read_metadata(self, files: list[Path]) -> dict[str, str]:
        captions: dict[str, str] = {}
        known = set(self._files)
        for file in files:
            for number, text in _jsonl(file):
                name = text.get("file_name")
                if not isinstance(name, str):
                    raise DavaeError(f"{file}, line {number}: no 'file_name'")
                path = os.path.normpath(os.path.join(os.path.relpath(file.parent, self.root), name))
                key = path.replace(os.sep, "/")
                caption = text.get("text", text.get("caption"))
                if key not in known:
                    self.problems.append((key, f"named in {file.name} but not there"))
                elif caption is not None:
                    captions[key] = str(caption).strip()
        return captions


def file_stamp(path: Path) -> str:
    """Size in bytes and time of change in nanoseconds: cheap to read, and changed by every usual way of writing."""
    status = path.stat()
    return f"{status.st_size} bytes, changed {status.st_mtime_ns}"


def _split_folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        kind = "is a file, not a folder" if root.exists() else "does not exist"
        raise DavaeError(f"the image folder {root} {kind}")
    entries = [e for e in root.iterdir() if not e.name.startswith(".")]
    folders = sorted(e.name for e in entries if e.is_dir())
    loose = any(e.suffix.lower() in IMAGE_SUFFIXES for e in entries)
    if folders and not loose and all(name.lower() in _SPLIT_NAMES for name in folders):
        if split is None:
            return root
        if split not in folders:
            raise DavaeError(f"{root} has no split '{split}'; it has {', '.join(folders)}")
        return root / split
    if split not in (None, "train"):
        raise DavaeError(f"{root} is not made of splits, so split '{split}' cannot be taken from it")
    return root


def _walk(root: Path) -> tuple[list[str], list[Path]]:
    """Paths of images relative to ``root``, and the metadata files. Links are followed, circles are not.

    Runs and caches of davae below the folder are passed over: their sample sheets are no photographs.
    """
    images: list[str] = []
    metadata: list[Path] = []
    seen: set[str] = set()
    for folder, below, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        ours = folder != str(root) and any(marks.issubset(files) for marks in _RUN_OR_CACHE)
        if ours:
            logger.info("%s is passed over: a run or a cache of davae", folder)
        if ours or real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "__MACOSX")
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        images += [
            prefix + name
            for name in files
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
        if "metadata.jsonl" in files:
            metadata.append(Path(folder) / "metadata.jsonl")
    return images, metadata


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DavaeError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # bad JSON, numbers without end, deep nesting
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DavaeError(f"{file}, line {number}, is not JSON: {reason}") from error
        if not isinstance(value, dict):
            raise DavaeError(f"{file}, line {number}, must be an object with 'file_name' and 'text'")
        yield number, value
