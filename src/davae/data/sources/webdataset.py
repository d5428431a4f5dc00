"""WebDataset shards: plain tar archives whose members share a name up to the first dot.

``000123.jpg`` is an image, ``000123.cls`` its class (a number or a name), ``000123.txt`` its caption, and
``000123.json`` may hold ``caption``, ``text``, ``label`` or ``cls``. An index of offsets is made when the
shards open; images are then read in any order straight from the archive. Nothing is ever written to disk,
so a member's name, whatever it says, leads nowhere.
"""

import glob
import io
import itertools
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from davae.data.images.dataset import Facts
from davae.data.images.protocol import Skip
from davae.data.sources.folder import IMAGE_SUFFIXES, file_stamp
from davae.errors import DavaeError

_MAX_TEXT_BYTES = 1 << 20
_BAD_ARCHIVE = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError, MemoryError)
"""What tarfile raises of headers that lie: about numbers, sizes, or what follows them."""


@dataclass
class _Sample:
    """One image in a shard: where its bytes are, and what stands beside it."""

    shard: int
    member: str
    offset: int
    size: int
    label: str | None = None
    caption: str = ""


@dataclass
class _Beside:
    """The small members of one key."""

    label: str | None = None
    caption: str | None = None
    images: list[_Sample] = field(default_factory=list)


class ShardSource:
    """Images inside tar files. An id is ``SHARD.tar/MEMBER``.

    A shard that ends too early gives the images before its damage; the damage is listed in ``problems``.

    Args:
        files: the shards, in order.
        name: for messages.

    Raises:
        DavaeError: a shard is missing, compressed or not a tar file, or no shard holds an image.
    """

    commit: str | None = None

    def __init__(self, files: Sequence[Path], name: str) -> None:
        self.name = name
        self.problems: list[Skip] = []
        self._files = list(files)
        self._shards = _short_names(self._files)
        self._stamps: dict[int, str] = {}
        self._samples: list[_Sample] = []
        for number in range(len(self._files)):
            self._samples += self._index(number)
        if not self._samples:
            raise DavaeError(
                f"no images in the {len(self._files)} shards of {name}: looked for members ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self.classes = _class_names({s.label for s in self._samples if s.label is not None})
        self._numbers = {name: i for i, name in enumerate(self.classes)}

    def __len__(self) -> int:
        return len(self._samples)

    def id(self, index: int) -> str:
        """Shard and member name."""
        sample = self._samples[index]
        return f"{self._shards[sample.shard]}/{sample.member}"

    def open(self, index: int) -> BinaryIO:
        """The member's bytes as a file of their own."""
        sample = self._samples[index]
        return io.BufferedReader(_Slice(self._files[sample.shard], sample.offset, sample.size))

    def facts(self, index: int) -> Facts:
        """Class and caption from the members beside the image."""
        sample = self._samples[index]
        number = -1 if sample.label is None else self._numbers[sample.label]
        return Facts(number, sample.caption)

    def stamp(self, index: int) -> str:
        """Where the image lies in its shard, and the shard's size and time of change."""
        sample = self._samples[index]
        if sample.shard not in self._stamps:
            self._stamps[sample.shard] = file_stamp(self._files[sample.shard])
        return f"{sample.size} bytes at {sample.offset} of {self._stamps[sample.shard]}"

    def _index(self, shard: int) -> list[_Sample]:
        path = self._files[shard]
        groups: dict[str, _Beside] = {}
        count, before = 0, -1
        try:
            with tarfile.open(path, "r:") as archive:
                size = path.stat().st_size
                for member in archive:
                    # Not every Python refuses a size below zero: it leads back to members that were read before.
                    if member.size < 0 or member.offset_data <= before:
                        raise tarfile.ReadError(f"the header of {member.name} leads back in the archive")
                    count, before = count + 1, member.offset_data
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    self._note(archive, member, groups, shard)
        except FileNotFoundError as error:
            raise DavaeError(f"the shard {path} does not exist") from error
        except _BAD_ARCHIVE as error:
            reason = str(error) or type(error).__name__
            if count == 0:
                raise DavaeError(
                    f"{path} is not a plain tar file ({reason}); compressed shards must be unpacked to .tar"
                ) from error
            self.problems.append((self._shards[shard], f"damaged after {count} members ({reason})"))
        samples = []
        for beside in groups.values():
            for sample in beside.images:
                sample.label, sample.caption = beside.label, beside.caption or ""
                samples.append(sample)
        return samples

    def _note(self, archive: tarfile.TarFile, member: tarfile.TarInfo, groups: dict[str, _Beside], shard: int) -> None:
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if not stem or not ending:  # a hidden file, or one without an ending
            return
        beside = groups.setdefault(f"{folder}/{stem}", _Beside())
        ending = ending.lower()
        if f".{ending.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            beside.images.append(_Sample(shard, member.name, member.offset_data, member.size))
        elif ending in {"cls", "txt", "json"}:
            stream = archive.extractfile(member) if member.size <= _MAX_TEXT_BYTES else None
            try:
                if stream is None:
                    raise ValueError(f"{member.size} bytes are too many for a text")
                _read_text(ending, stream.read().decode("utf-8-sig"), beside)
            except (ValueError, RecursionError) as error:  # also bad UTF-8, and JSON, bad or deep
                self.problems.append((f"{self._shards[shard]}/{member.name}", f"cannot be read ({error})"))


class _Slice(io.RawIOBase):
    """A read-only file that is a stretch of another. Each has its own handle: forked workers share none."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._start, self._size, self._at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def find_shards(pattern: str) -> list[Path]:
    """Shard files of a pattern with braces (``{000..015}``, ``{a,b}``) and wildcards, in order.

    Raises:
        DavaeError: nothing matches.
    """
    found: list[Path] = []
    for name in expand_braces(pattern):
        found += [Path(p) for p in sorted(glob.glob(name))] if glob.has_magic(name) else [Path(name)]
    if not found:
        raise DavaeError(f"no shard matches {pattern}")
    return found


def expand_braces(pattern: str) -> Iterator[str]:
    """``a-{00..02}.tar`` to ``a-00.tar``, ``a-01.tar``, ``a-02.tar``; ``{x,y}`` to either; all combined."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str]] = []
    for i, part in enumerate(parts):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if i % 2 == 0:
            choices.append([part])
        elif span:
            first, last = span.groups()
            width = max(len(first), len(last)) if first.startswith("0") else 0
            choices.append([str(n).zfill(width) for n in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ("".join(c) for c in itertools.product(*choices))


def _read_text(ending: str, text: str, beside: _Beside) -> None:
    text = text.strip()
    if ending == "cls":
        beside.label = text
    elif ending == "txt":
        beside.caption = text
    else:
        values = json.loads(text)
        if not isinstance(values, dict):
            return
        caption = values.get("caption", values.get("text"))
        label = values.get("label", values.get("cls"))
        if beside.caption is None and isinstance(caption, str):
            beside.caption = caption.strip()
        if beside.label is None and isinstance(label, int | str):
            beside.label = str(label)


def _class_names(labels: set[str]) -> list[str]:
    """Numbers make classes 0 to the largest; names make classes in alphabetical order."""
    if labels and all(re.fullmatch(r"\d{1,6}", label) for label in labels):
        return [str(i) for i in range(max(map(int, labels)) + 1)]
    return sorted(labels)


def _short_names(files: Sequence[Path]) -> list[str]:
    """File names, or whole paths where two shards of different folders have the same name."""
    names = [f.name for f in files]
    return names if len(set(names)) == len(names) else [f.as_posix() for f in files]
