"""Shards: named tensors in safetensors files or in tar archives (WebDataset), read one record at a time.

A record is a key and a few named tensors. In a safetensors shard the tensors are called ``KEY.NAME``. In a tar
shard a record is the members ``KEY.safetensors`` (its tensors) and ``KEY.json`` (its line of the index), as
WebDataset readers expect. Nothing is unpacked or unpickled.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from davae.errors import DavaeError
from davae.runtime.atomic_files import atomic_file
from davae.runtime.weight_files import atomic_tensors

Format = Literal["safetensors", "webdataset"]
MAKE_AGAIN = "make it again in another folder, with `davae cache --out` and data.cache"
"""Advice on a damaged cache, which no update mends."""
SUFFIXES: dict[str, str] = {"safetensors": ".safetensors", "webdataset": ".tar"}
_NAME = re.compile(r"[a-z]+-\d{5,}\.(safetensors|tar)")
_KEY = re.compile(r"[0-9a-zA-Z_-]+")


@dataclass
class Record:
    """A key, its tensors, and plain values for the index."""

    key: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise DavaeError(f"a cache key is made of letters, digits, '-' and '_', not '{self.key}'")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


def write_shard(path: Path, records: Sequence[Record]) -> list[dict[str, Any]]:
    """Write a shard atomically.

    Returns:
        One index line per record: ``key``, ``shard``, the record's facts, and in tar shards where its tensors are.
    """
    lines = [{"key": r.key, "shard": path.name, **r.facts} for r in records]
    if path.suffix != ".tar":
        atomic_tensors(path, {f"{r.key}.{k}": v for r in records for k, v in r.tensors.items()})
        return lines
    with atomic_file(path) as partial, tarfile.open(partial, "w", format=tarfile.USTAR_FORMAT) as archive:
        for record, line in zip(records, lines):
            body = safetensors.torch.save({k: v.contiguous() for k, v in record.tensors.items()})
            line |= {"offset": archive.offset + tarfile.BLOCKSIZE, "bytes": len(body)}
            _add(archive, f"{record.key}.safetensors", body)
            _add(archive, f"{record.key}.json", json.dumps(record.facts).encode())
    return lines


def is_shard_name(name: str) -> bool:
    """Whether a name is of the form that davae gives to shards."""
    return _NAME.fullmatch(name) is not None


def shard_path(folder: Path, name: str) -> Path:
    """The file of a shard that an index names.

    Raises:
        DavaeError: the name is not one that davae writes, or the file lies outside the folder.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DavaeError(f"the index of the cache {folder} names the shard {name!r}, which is no shard's name")
    path = folder / name
    if path.resolve().parent != folder.resolve():
        raise DavaeError(f"the shard {path} is a link that leads out of the cache; put the file itself there")
    return path


class ShardReader:
    """Reads records of a cache folder. Each process opens its own files; safetensors are memory-mapped.

    Args:
        folder: the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_open": {}, "_process": -1}

    def read(self, line: dict[str, Any]) -> dict[str, Tensor]:
        """The tensors of the record that an index line names.

        Raises:
            DavaeError: the shard is missing, damaged, or does not hold the record.
        """
        if self._process != os.getpid():  # otherwise open files are shared with the parent process
            self._open, self._process = {}, os.getpid()
        name, key = line["shard"], line["key"]
        try:
            if name.endswith(".tar"):
                return self._from_tar(name, int(line["offset"]), int(line["bytes"]))
            return self._from_safetensors(name, key)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DavaeError(
                f"the record '{key}' cannot be read from {self.folder / str(name)}: {error}. "
                f"`davae cache --verify` finds damaged shards"
            ) from error

    def _from_safetensors(self, name: str, key: str) -> dict[str, Tensor]:
        if name not in self._open:
            file = safe_open(shard_path(self.folder, name), framework="pt")
            names: dict[str, list[str]] = {}
            for full in file.keys():  # noqa: SIM118 (not a dictionary)
                names.setdefault(full.partition(".")[0], []).append(full)
            self._open[name] = (file, names)
        file, names = self._open[name]
        return {full.partition(".")[2]: file.get_tensor(full) for full in names[key]}

    def _from_tar(self, name: str, offset: int, size: int) -> dict[str, Tensor]:
        if name not in self._open:
            path = shard_path(self.folder, name)
            self._open[name] = (path.open("rb"), path.stat().st_size)
        file, length = self._open[name]
        if not (offset >= 0 and size >= 0 and offset + size <= length):
            raise ValueError(f"bytes {offset} to {offset + size} of a file of {length}")
        body = os.pread(file.fileno(), size, offset)
        return safetensors.torch.load(body)


def stored(tensors: dict[str, Tensor], dtype: torch.dtype, *, widen: bool) -> dict[str, Tensor]:
    """Tensors as a cache stores them: on the CPU, floating-point ones as ``dtype``, others unchanged.

    Without ``widen``, floating-point tensors of fewer bytes than ``dtype`` are unchanged too.
    """

    def kept(tensor: Tensor) -> Tensor:
        cast = tensor.is_floating_point() and (widen or tensor.element_size() > dtype.itemsize)
        return (tensor.to(dtype) if cast else tensor).detach().cpu().contiguous().clone()

    return {name: kept(tensor) for name, tensor in tensors.items()}


def _add(archive: tarfile.TarFile, name: str, body: bytes) -> None:
    member = tarfile.TarInfo(name)  # no times, no owners: the same records make the same file
    member.size = len(body)
    archive.addfile(member, io.BytesIO(body))
