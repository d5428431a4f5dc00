"""The index of a cache, ``index.jsonl``: an append-only journal, one JSON object per line.

Lines of records (``key``, ``shard``, facts) come before the line that commits their shard (``commit`` with the
shard's size and SHA-256). A shard without a commit line is unfinished and does not count; its lines are removed
when a writer continues. The last line, ``complete``, says that nothing is missing.

Several processes that write one cache have a journal each, ``.index-N.jsonl``, of the same form. The first process
merges them into the index at the end, or when a stopped run continues.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from davae.data.cache.shards import MAKE_AGAIN, shard_path
from davae.errors import DavaeError
from davae.runtime.atomic_files import atomic_write, file_hash, remove_file
from davae.runtime.text_files import plain_json

INDEX = "index.jsonl"


@dataclass
class Index:
    """The contents of an index.

    Attributes:
        records: the lines of records in committed shards.
        shards: ``entries``, ``bytes`` and ``sha256`` by name.
        complete: the writer's notes at the end; ``None`` if the cache is unfinished.
        end: bytes of the index up to its last commit.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    complete: dict[str, Any] | None = None
    end: int = 0


def read_index(folder: Path, name: str = INDEX) -> Index:
    """Read the committed part of an index, or of a process's journal, and check that its shards exist with the right
    sizes.

    Raises:
        DavaeError: a shard is missing, has another size, or lies outside the folder; a line is not JSON.
    """
    index, at = Index(), 0
    waiting: list[dict[str, Any]] = []
    path = folder / name
    if not path.is_file():
        return index
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            at += len(raw)
            try:
                line = plain_json(raw)
                if not isinstance(line, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if raw.endswith(b"\n"):
                    raise DavaeError(f"{path}, line {number} is not JSON: {error}") from error
                break  # the writer was interrupted inside this line
            if "commit" in line:
                shard_name = line["commit"]
                wrong = [r for r in waiting if r.get("shard") != shard_name or "key" not in r]
                if wrong or len(waiting) != line["entries"]:
                    raise DavaeError(f"{path}, line {number}: the lines before do not belong to shard {shard_name}")
                shard_path(folder, shard_name)
                index.records += waiting
                index.shards[shard_name] = {k: line[k] for k in ("entries", "bytes", "sha256")}
                waiting, index.end = [], at
            elif "complete" in line:
                index.complete, index.end = line["complete"], at
            else:
                waiting.append(line)
    for shard_name, shard in index.shards.items():
        file_path = shard_path(folder, shard_name)
        if not file_path.is_file():
            raise DavaeError(f"the cache {folder} lacks its shard {shard_name}: copy it again, or {MAKE_AGAIN}")
        if file_path.stat().st_size != shard["bytes"]:
            raise DavaeError(
                f"the shard {file_path} has {file_path.stat().st_size} bytes, the index says {shard['bytes']}: "
                f"copy it again, or {MAKE_AGAIN}"
            )
    return index


def append(folder: Path, lines: list[dict[str, Any]], name: str = INDEX) -> None:
    """Append lines to the index, or to a process's journal, and flush them to disk."""
    with (folder / name).open("ab") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
        file.flush()
        os.fsync(file.fileno())


def cut(folder: Path, end: int) -> None:
    """Remove what a stopped writer left after the last commit."""
    path = folder / INDEX
    if path.is_file() and path.stat().st_size > end:
        with path.open("r+b") as file:
            file.truncate(end)


def rewrite(folder: Path, index: Index) -> None:
    """Replace the index atomically; ``complete`` and shards without a record are left out."""
    lines: list[dict[str, Any]] = []
    for name, inside in _by_shard(index).items():
        if inside:
            lines += [*inside, {"commit": name, **index.shards[name], "entries": len(inside)}]
    atomic_write(folder / INDEX, "".join(json.dumps(line) + "\n" for line in lines))


def journal_of(rank: int, world_size: int) -> str:
    """The file that process ``rank`` of ``world_size`` commits its shards to; for a single process, the index."""
    return INDEX if world_size == 1 else f".index-{rank}.jsonl"


def merge_journals(folder: Path) -> None:
    """Merge the shards committed to the processes' journals into the index, and remove the journals.

    A kill in between does no harm: shards that are already in the index are ignored the next time.
    """
    index = read_index(folder)
    cut(folder, index.end)
    for journal in sorted(folder.glob(".index-*.jsonl")):
        found = read_index(folder, journal.name)
        for name, lines in _by_shard(found).items():
            if name not in index.shards:
                append(folder, [*lines, {"commit": name, **found.shards[name]}])
        remove_file(journal)


def _by_shard(index: Index) -> dict[str, list[dict[str, Any]]]:
    """The records of each shard, in one pass: other processes wait while the first one merges millions."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in index.shards}
    for line in index.records:
        found[line["shard"]].append(line)
    return found


def verify_cache(folder: str | Path) -> int:
    """Compare every shard of a cache with its SHA-256; returns the number of shards.

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
            f"Copy them again, or {MAKE_AGAIN}"
        )
    return len(index.shards)
