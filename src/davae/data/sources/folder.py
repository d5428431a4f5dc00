"""A folder of images, at any depth: classes from parent folders, captions from text files or metadata."""

import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from davae.data.images.dataset import Facts
from davae.data.images.decode import UnreadableImage
from davae.data.images.protocol import Skip
from davae.data.sources.facts import (
    METADATA_NAMES,
    TEXT_ENDINGS,
    WrongLabel,
    caption_in,
    class_names,
    facts_in,
    label_in,
    match_rows,
    texts_beside,
)
from davae.errors import DavaeError
from davae.runtime.console import shown
from davae.runtime.places import is_of_davae
from davae.runtime.text_files import CAPTION_BYTES, open_regular, read_text, whole_name

logger = logging.getLogger(__name__)

HEADER_CHECK_LIMIT = 20_000
"""Sets with more images open without reading every header and caption (some 0.1 ms each); faults are met later."""

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".jp2", ".png", ".apng", ".webp", ".avif"}
    | {".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".qoi"}
)
"""Extensions of image files, in lower case; other files are ignored."""

_SPLIT_NAMES = frozenset(
    {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation"}
)

_NOT_OURS = frozenset(
    {"__macosx", "@eadir", "@__thumb", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"}
    | {"$recycle.bin", "recycler", "system volume information", "lost+found"}
)
"""Folders, in lower case, that operating systems and network storage create; they hold copies and thumbnails."""

_PASSED_OVER = frozenset(
    {".heic", ".heif", ".jxl", ".svg", ".psd", ".exr", ".hdr", ".tga", ".eps", ".pdf"}
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}
)
"""Extensions of unsupported image formats; such files are counted when the folder opens."""


def not_ours(name: str) -> bool:
    """Whether a file or folder of that name is hidden, or a system's."""
    return (name.startswith(".") and name.strip(".") != "") or name.lower() in _NOT_OURS


class FolderSource:
    """Images below a folder, sorted by path.

    * The class is the name of the parent folder, where images lie in more than one folder. Images directly in
      the folder itself then have no class (label -1).
    * The caption is in a text beside (``a.txt``, ``a.caption``, ``a.json``, ``a.jpg.txt``), or in a metadata file as
      those of Hugging Face image folders (``metadata.jsonl``, ``.csv``, ``.parquet``), which comes first. Labels in
      metadata, ``a.cls`` or ``a.json`` replace the folders' names.
    * Where the first level holds nothing but splits (``train``, ``validation``, ...), ``split`` chooses one.

    Hidden files and folders, those of other systems, and what davae wrote (runs, caches, generated images, figures) are
    passed over.

    Args:
        root: the folder.
        split: a folder of the first level, if that level consists of splits.

    Raises:
        DavaeError: no such folder or split, no image in it, or a damaged metadata file.
    """

    commit: str | None = None

    def __init__(self, root: str | Path, split: str | None = "train") -> None:
        self.root = _split_folder(Path(root), split)
        self.name = whole_name(str(self.root))
        self.problems: list[Skip] = []
        found = _walk(self.root)
        self._files = sorted(found.images)
        if not self._files:
            raise DavaeError(
                f"no images in {self.root}: looked in it and below for files ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}{found.passed_over()}"
            )
        if self.root != Path(root):  # of all splits, perhaps
            found.metadata += _metadata(Path(root), os.listdir(root))
        self._rows, self._matched, self._unmatched = match_rows(found.metadata, self.root, self._files)
        self.problems += self._unmatched
        self._above, self._passed_over = root, found.passed_over()
        bases = {name: (os.path.splitext(name)[0], name) for name in self._files} if found.texts else {}
        self._beside = texts_beside(bases, found.texts)
        self._told: set[str] = set()  # texts that cannot be read
        self._lists: set[str] = set()  # keys of lists of labels
        self.classes, self._labels = self._find_classes()

    @property
    def summary(self) -> str:
        """One line: images, captions (read for that in small sets), metadata and what was ignored."""
        if len(self) <= HEADER_CHECK_LIMIT:
            found = f"{sum(bool(self.facts(index).caption) for index in range(len(self)))} with a caption"
        else:
            count = sum(name in self._beside or bool(caption_in(self._rows.get(name, {}))) for name in self._files)
            found = f"{count} with a text"
        line = f"{len(self)} images, {found}"
        for file, count in self._matched.items():
            line += f"; {count} rows of {os.path.relpath(file, self._above)}"
        if self._unmatched:
            line += f"; {len(self._unmatched)} rows match no image, such as {self._unmatched[0][0]}"
        return whole_name(line + self._passed_over)

    def __len__(self) -> int:
        return len(self._files)

    def id(self, index: int) -> str:
        """The image's path below the folder, with forward slashes."""
        return whole_name(self._files[index])

    def open(self, index: int) -> BinaryIO:
        """The image file."""
        return open_image(self.root / self._files[index])

    def stamp(self, index: int) -> str:
        """The file's size in bytes and modification time in nanoseconds."""
        return file_stamp(self.root / self._files[index])

    def facts(self, index: int) -> Facts:
        """Class and caption; a text that cannot be read is logged once, and says nothing."""
        name = self._files[index]
        caption = ""
        try:
            caption = caption_in(self._rows.get(name, {}))
        except DavaeError as error:
            self._tell(name, error)
        texts = [] if caption else self._beside.get(name, [])
        return Facts(self._labels[index], caption or next(filter(None, (self._text(text)[1] for text in texts)), ""))

    def _text(self, beside: str) -> tuple[int | str | None, str]:
        """Label and caption in a text beside an image."""
        try:
            return facts_in(read_text(self.root / beside, most_bytes=CAPTION_BYTES), beside, beside, self._lists)
        except WrongLabel as error:
            raise DavaeError(f"{self.root / error.args[0]}") from error
        except (DavaeError, OSError) as error:
            self._tell(beside, error)
            return None, ""

    def _tell(self, name: str, error: Exception) -> None:
        if name not in self._told:
            self._told.add(name)
            reason = str(error).replace(str(self.root / name), "it")
            self.problems.append((whole_name(name), f"the caption cannot be read ({reason})"))
            if len(self) > HEADER_CHECK_LIMIT:  # otherwise told when the set opens
                logger.warning("%s: the caption cannot be read: %s", shown(whole_name(name)), shown(reason))

    def _label(self, name: str) -> int | str | None:
        label = label_in(self._rows.get(name, {}), f"{self.name}: {name}", self._lists)
        texts = [text for text in self._beside.get(name, []) if text.lower().endswith((".cls", ".json"))]
        return next((found for found in (label, *(self._text(text)[0] for text in texts)) if found is not None), None)

    def _find_classes(self) -> tuple[list[str], list[int]]:
        """Classes and labels from metadata and texts beside the images if any has one, else from the folders' names."""
        labels = [self._label(name) for name in self._files]
        if any(label is not None for label in labels):
            classes, numbers = class_names(labels, self.name)
            return classes, [-1 if label is None else numbers[label] for label in labels]
        parents = [Path(f).parent for f in self._files]
        names = sorted({p.name for p in parents if p.name})
        classes = names if len({p.name for p in parents}) > 1 else []
        positions = {name: i for i, name in enumerate(classes)}
        return [whole_name(name) for name in classes], [positions.get(p.name, -1) for p in parents]


def open_image(path: Path) -> BinaryIO:
    """Open an image file.

    Raises:
        UnreadableImage: it is a pipe or a device.
        OSError: as ``open``.
    """
    try:
        return open_regular(path)
    except DavaeError as error:
        raise UnreadableImage("a pipe or a device, not a file") from error


def file_stamp(path: Path) -> str:
    """Size in bytes and modification time in nanoseconds, which change whenever a file is written normally."""
    status = path.stat()
    return f"{status.st_size} bytes, changed {status.st_mtime_ns}"


def _split_folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        kind = "is a file, not a folder" if root.exists() else "does not exist"
        raise DavaeError(f"the image folder {root} {kind}")
    entries = [e for e in root.iterdir() if not not_ours(e.name)]
    folders = sorted(e.name for e in entries if e.is_dir())
    loose = any(e.suffix.lower() in IMAGE_SUFFIXES for e in entries)
    if folders and not loose and all(name.lower() in _SPLIT_NAMES for name in folders):
        if split is None:
            return root
        chosen = [name for name in folders if name == split] or [n for n in folders if n.lower() == split.lower()]
        if not chosen:
            raise DavaeError(f"{root} has no split '{split}'; it has {', '.join(folders)}")
        return root / chosen[0]
    if split not in (None, "train"):
        raise DavaeError(f"{root} is not made of splits, so split '{split}' cannot be taken from it")
    return root


@dataclass
class _Found:
    """What lies in a folder: images and texts by their paths below it, metadata files, and what is passed over."""

    images: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    def passed_over(self) -> str:
        """What was ignored, as text; empty if nothing was."""
        found = ", ".join(f"{count} {what}" for what, count in sorted(self.others.items()))
        return f"; passed over: {found}" if found else ""


def _walk(root: Path) -> _Found:
    """What lies below a folder. Links are followed, circles are not.

    What davae wrote is passed over: sample sheets and generated images are no photographs.
    """
    found = _Found()
    seen: set[str] = set()

    def unreadable(error: OSError) -> None:
        found.others["folders that cannot be read"] += 1
        logger.warning("%s cannot be read: %s", shown(whole_name(str(error.filename))), error.strerror)

    for folder, below, files in os.walk(root, followlinks=True, onerror=unreadable):
        real = os.path.realpath(folder)
        ours = folder != str(root) and is_of_davae(Path(folder), files)
        if ours:
            found.others["folders that davae wrote"] += 1
        if ours or real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if not not_ours(name))
        relative = os.path.relpath(folder, root).replace(os.sep, "/")
        prefix = "" if relative == "." else f"{relative}/"
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if not_ours(name):
                continue
            if ending in IMAGE_SUFFIXES:
                found.images.append(prefix + name)
            elif ending in TEXT_ENDINGS:
                found.texts.append(prefix + name)
            elif ending in _PASSED_OVER:
                found.others[ending] += 1
        found.metadata += _metadata(Path(folder), files)
    return found


def _metadata(folder: Path, files: list[str]) -> list[Path]:
    """The metadata files among those of a folder, in whatever case their names are."""
    found = [name for wanted in METADATA_NAMES for name in sorted(files) if name.lower() == wanted]
    return [folder / name for name in found if not (folder / name).is_dir()]
