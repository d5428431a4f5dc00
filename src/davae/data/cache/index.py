"""The index of a cache, ``index.jsonl``: a journal that is only ever appended to, one JSON object a line.

Lines of records (``key``, ``shard``, facts) stand before the line that commits their shard (``commit`` with the
shard's size and SHA-256). A shard without a commit line was not finished and does not count; its lines are cut
off when a writer goes on. The last line, ``complete``, says that nothing is missing.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.data.cache.shards import file_hash, shard_path
from davae.errors import DavaeError

INDEX = "index.jsonl"


@dataclass
class Index:
    """What an index says.

    Attributes:
        records: the lines of records in committed shards.
        shards: name -> ``entries``, ``bytes`` and ``sha256``.
        complete: what the writer noted at the end; none where it did not come so far.
        end: bytes of the index up to its last commit.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: dict[str, Any] | None = None
    end: int = 0


def read_index(folder: Path) -> Index:
    """Read the committed part of an index and check that its shards are there, whole by their sizes.

    Raises:
        DavaeError: a shard is missing, has another size, or lies outside the folder; a line is no JSON.
    """
    index, at = Index(), 0
    waiting: list[dict[str, Any]] = []
    path = folder / INDEX
    if not path.is_file():
        return index
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            at += len(raw)
            try:
                line = json.loads(raw)
                if not isinstance(line, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if raw.endswith(b"\n"):
                    raise DavaeError(f"{path}, line {number}, is not JSON: {error}") from error
                break  # the writer was stopped inside this line
            if "commit" in line:
                name = line["commit"]
                wrong = [r for r in waiting if r.get("shard") != name or "key" not in r]
                if wrong or len(waiting) != line["entries"]:
                    raise DavaeError(f"{path}, line {number}: the lines before do not belong to shard {name}")
                shard_path(folder, name)
                index.records += waiting
                index.shards[name] = {k: line[k] for k in ("entries", "bytes", "sha256")}
                waiting, index.end = [], at
            elif "complete" in line:
                index.complete, index.end = line["complete"], at
            else:
                waiting.append(line)
    for name, shard in index.shards.items():
        file_path = shard_path(folder, name)
        if not file_path.is_file():
            raise DavaeError(
                f"the cache {folder} lacks its shard {name}: copy it again, or make the cache anew"
            )
        if file_path.stat().st_size != shard["bytes"]:
            raise DavaeError(
                f"the shard {file_path} has {file_path.stat().st_size} bytes, the index says {shard['bytes']}: "
                f"copy it again, or make the cache anew"
            )
    return index


def append(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Add lines and put them on the disk."""
    with (folder / INDEX).open("ab") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def cut(folder: Path, end: int) -> None:
    """Remove what a stopped writer left behind the last commit."""
    path = folder / INDEX
    if path.is_file() and path.stat().st_size > end:
        with path.open("r+b") as file:
            file.truncate(end)


def verify_cache(folder: str | Path) -> int:
    """Compare every shard of a cache with its SHA-256; returns how many there are.

    Raises:
        DavaeError: naming the shards that differ.
    """
    folder = Path(folder)
    index = read_index(folder)
    if not index.shards:
        raise DavaeError(f"there is no cache in {folder}")
    damaged = [n for n, s in index.shards.items() if file_hash(shard_path(folder, n)) != s["sha256"]]
    if damaged:
        raise DavaeError(
            f"{len(damaged)} of {len(index.shards)} shards of {folder} are damaged: {', '.join(damaged)}. "
            f"Copy them again, or make the cache anew"
        )
    return len(index.shards)
