"""WebDataset shards: plain tar archives whose members share a name up to the first dot.

``000123.jpg`` is an image, ``000123.cls`` its class (a number or a name), ``000123.txt`` its caption, and
``000123.json`` may hold both, under the names of a table's columns. Beside ``000123.jpg`` another image of the same key
(``000123.mask.png``) is ignored; names with further dots (``a.b.jpg``) are matched with their texts too. Offsets are
indexed when the shards open; images are then read directly from the archive, in any order. Nothing is
written to disk, so members' names cannot cause harm.
"""

import glob
import io
import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from davae.data.images.dataset import Facts
from davae.data.images.protocol import Skip
from davae.data.sources.facts import TEXT_ENDINGS, WrongLabel, class_names, facts_in, texts_beside
from davae.data.sources.folder import IMAGE_SUFFIXES, file_stamp, not_ours
from davae.errors import DavaeError
from davae.runtime.text_files import CAPTION_BYTES, decode_text, whole_name

_BAD_ARCHIVE = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError, MemoryError)
"""Errors of tarfile for invalid headers."""
_Texts = dict[str, tuple[int | str | None, str] | WrongLabel]


@dataclass
class _Sample:
    """One image in a shard: the position of its bytes, its label and its caption."""

    shard: int
    member: str
    offset: int
    size: int
    label: int | str | None = None
    caption: str = ""


class ShardSource:
    """Images inside tar files. An id is ``SHARD.tar/MEMBER``.

    Of a damaged shard the images before the damage are used; the damage is listed in ``problems``.

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
        self._further = 0
        self._told: set[str] = set()  # keys of lists of labels
        for number in range(len(self._files)):
            self._samples += self._index(number)
        if not self._samples:
            raise DavaeError(
                f"no images in the {len(self._files)} shards of {name}: looked for members ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        self.classes, self._numbers = class_names({s.label for s in self._samples}, name)
        captions = sum(bool(sample.caption) for sample in self._samples)
        self.summary = f"{len(self._samples)} images in {len(self._files)} shards, {captions} with a caption"
        if self._further:
            self.summary += f"; passed over: {self._further} further images of a key, such as masks"

    def __len__(self) -> int:
        return len(self._samples)

    def id(self, index: int) -> str:
        """Shard and member name."""
        sample = self._samples[index]
        return whole_name(f"{self._shards[sample.shard]}/{sample.member}")

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
        images: list[_Sample] = []
        texts: _Texts = {}
        count, before = 0, -1
        if not path.is_file():
            kind = "is a pipe, a device or a folder, not a file" if path.exists() else "does not exist"
            raise DavaeError(f"the shard {path} {kind}")
        try:
            with tarfile.open(path, "r:") as archive:
                size = path.stat().st_size
                for member in archive:
                    # Not every Python refuses a negative size, which leads back to earlier members.
                    if member.size < 0 or member.offset_data <= before:
                        raise tarfile.ReadError(f"the header of {member.name} leads back in the archive")
                    count, before = count + 1, member.offset_data
                    if not member.isreg() or member.issparse():
                        continue
                    if member.offset_data + member.size > size:
                        raise tarfile.ReadError("unexpected end of data")
                    self._note(shard, archive, member, images, texts)
        except _BAD_ARCHIVE as error:
            reason = str(error) or type(error).__name__
            if count == 0:
                raise DavaeError(
                    f"{path} is not a plain tar file ({reason}); compressed shards must be unpacked to .tar"
                ) from error
            self.problems.append((self._shards[shard], f"damaged after {count} members ({reason})"))
        stems = {image.member: os.path.splitext(image.member)[0] for image in images}
        keys = {stem for stem in stems.values() if stem == _key(stem)}
        samples = [i for i in images if stems[i.member] == _key(i.member) or _key(i.member) not in keys]
        self._further += len(images) - len(samples)
        bases = {i.member: list(dict.fromkeys((stems[i.member], i.member, _key(i.member)))) for i in samples}
        beside = texts_beside(bases, texts)
        for image in samples:
            found = []
            for said in (texts[text] for text in beside.get(image.member, [])):
                if isinstance(said, WrongLabel):
                    raise said
                found.append(said)
            image.label = next((label for label, _ in found if label is not None), None)
            image.caption = next((caption for _, caption in found if caption), "")
        return samples

    def _note(self, shard: int, archive: Any, member: tarfile.TarInfo, images: list[_Sample], texts: _Texts) -> None:
        ending = os.path.splitext(member.name)[1].lower()
        if not ending or any(map(not_ours, member.name.split("/"))):
            return
        if ending in IMAGE_SUFFIXES:
            images.append(_Sample(shard, member.name, member.offset_data, member.size))
        elif ending in TEXT_ENDINGS:
            stream = archive.extractfile(member)
            place = whole_name(f"{self._shards[shard]}/{member.name}")
            try:
                text = decode_text(stream.read(CAPTION_BYTES + 1), place)
                texts[member.name] = facts_in(text, member.name, place, self._told)
            except WrongLabel as error:
                texts[member.name] = error  # of an image, perhaps
            except DavaeError as error:
                texts[member.name] = (None, "")
                self.problems.append((place, f"cannot be read ({str(error).removeprefix(place).strip(' ,:')})"))


class _Slice(io.RawIOBase):
    """A read-only file that is a part of another one, with its own handle, so that forked workers share none."""

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
    folder, last = os.path.split(pattern)
    literal = bool(folder) and Path(folder).is_dir()  # braces and brackets are then part of the folder's name
    for name in expand_braces(last if literal else pattern):
        path = os.path.join(folder, name) if literal else name
        found += matching_files(path) if glob.has_magic(name) else [Path(path)]
    if not found:
        raise DavaeError(f"no shard matches {pattern}")
    return found


def matching_files(pattern: str) -> list[Path]:
    """Files of a pattern with wildcards, sorted; a file with exactly that name (``photos[1]``) has precedence."""
    if Path(pattern).exists():
        return [Path(pattern)]
    folder, name = os.path.split(pattern)
    if glob.has_magic(folder) and Path(folder).is_dir():
        pattern = os.path.join(glob.escape(folder), name)
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]


def expand_braces(pattern: str) -> Iterator[str]:
    """Expand ``a-{00..02}.tar`` to ``a-00.tar``, ``a-01.tar``, ``a-02.tar``, and ``{x,y}`` to both, in combination."""
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


def _key(member: str) -> str:
    """A member's name up to the first dot of its last part."""
    folder, slash, base = member.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _short_names(files: Sequence[Path]) -> list[str]:
    """File names, or whole paths if shards in different folders have the same name."""
    names = [f.name for f in files]
    return names if len(set(names)) == len(names) else [f.as_posix() for f in files]
