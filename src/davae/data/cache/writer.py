"""Writing a cache: records are collected, written as whole shards and committed to the index; a later run continues.

Several processes may write one cache together: each has its own shards and journal.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from davae.data.cache.fingerprint import Fingerprint, caption_key
from davae.data.cache.index import append, journal_of, merge_journals, read_index, rewrite
from davae.data.cache.shards import MAKE_AGAIN, SUFFIXES, Format, Record, is_shard_name, stored, write_shard
from davae.errors import DavaeError
from davae.runtime.atomic_files import atomic_json, file_hash, make_folder, remove_file, remove_leftovers
from davae.runtime.devices import DTYPES
from davae.runtime.text_files import read_object

logger = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20
SHARD_RECORDS = 4096
SHARD_SECONDS = 300.0
LATENTS, TEXTS = "latents", "texts"
"""The two kinds of shards, as prefixes of their names."""


class CacheWriter:
    """Writes records into shards; an unfinished cache in the folder is continued.

    A cache of the same models and settings but other images, labels or captions is updated: records of
    unchanged images are kept, the others dropped from the index.

    Args:
        folder: the cache; created if absent.
        fingerprint: of the cache; its ``dtype`` fact is the storage type.
        form: ``safetensors`` or ``webdataset`` (tar).
        about: plain values for readers (class names, skipped files).
        shard_bytes: a shard is closed when its tensors reach this size.
        shard_records: or when it has this many records.
        shard_seconds: or this long after its first record, which bounds what a killed run loses of each kind.
        captions: returns captions by image id, to update changed ones.
        rank: number of this process. The first one, 0, must open the cache before the others do.
        world_size: number of processes that write it together.

    Raises:
        DavaeError: the folder holds a cache of other models, settings or format, or other files.
    """

    def __init__(
        self,
        folder: str | Path,
        fingerprint: Fingerprint,
        *,
        form: Format = "safetensors",
        about: dict[str, Any] | None = None,
        shard_bytes: int = SHARD_BYTES,
        shard_records: int = SHARD_RECORDS,
        shard_seconds: float = SHARD_SECONDS,
        captions: Callable[[], Mapping[str, str]] = dict,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if form not in SUFFIXES:
            raise DavaeError(f"the format is '{form}'; known are {', '.join(SUFFIXES)}")
        self.folder, self.form = Path(folder), form
        self.dtype = DTYPES[fingerprint.facts["dtype"]]
        self.shard_bytes, self.shard_records, self.shard_seconds = shard_bytes, shard_records, shard_seconds
        self._journal, self._every = journal_of(rank, world_size), world_size
        if rank == 0:
            self._prepare(fingerprint, about or {}, captions)
        self.index = read_index(self.folder)
        self.done = {kind: set[str]() for kind in (LATENTS, TEXTS)}
        self.positions = {(line["position"], line["flip"]) for line in self.index.records if "position" in line}
        for line in self.index.records:
            self.done[line["shard"].partition("-")[0]].add(line["key"])
        self._next = {kind: _first_free(self.index.shards, kind) + rank for kind in (LATENTS, TEXTS)}
        self._waiting: dict[str, list[Record]] = {LATENTS: [], TEXTS: []}
        self._since = {LATENTS: 0.0, TEXTS: 0.0}

    def _prepare(
        self, fingerprint: Fingerprint, about: dict[str, Any], captions: Callable[[], Mapping[str, str]]
    ) -> None:
        """Create the folder, or check that it holds the same cache, and clean up after a stopped run."""
        make_folder(self.folder)
        old = None
        if (self.folder / "fingerprint.json").is_file():
            old = Fingerprint.load(self.folder)
            if old.fact_differences(fingerprint):
                old.check(fingerprint, self.folder)
            made = read_about(self.folder)["format"]
            if made != self.form:
                raise DavaeError(f"the cache {self.folder} is of format {made}, not {self.form}: give --format {made}")
        else:
            others = [p.name for p in self.folder.iterdir() if not p.name.startswith(".")]
            if set(others) - {"cache.json", "sources.jsonl"}:
                raise DavaeError(f"{self.folder} holds other files ({min(others)}); give an empty folder")
            atomic_json(self.folder / "cache.json", {"format": self.form, **about})
            fingerprint.save(self.folder)
        remove_leftovers(self.folder)
        merge_journals(self.folder)
        if old is not None:
            self._bring_up_to_date(old, fingerprint, about, captions)
        committed = read_index(self.folder).shards
        for file in self.folder.iterdir():
            if is_shard_name(file.name) and file.name not in committed:
                remove_file(file)  # written whole but not committed

    def _bring_up_to_date(
        self, old: Fingerprint, new: Fingerprint, about: dict[str, Any], captions: Callable[[], Mapping[str, str]]
    ) -> None:
        """Keep the records of unchanged images, with their new positions and captions.

        A kill leaves an index without its last line, which is not trained from, and the next call repeats this.
        """
        index, places = read_index(self.folder), {name: i for i, name in enumerate(new.sources)}
        found, before = old.differences(new), list(old.sources)
        latents = [line for line in index.records if "position" in line]
        if not found and all(_fits(line, old, before) for line in latents):
            return
        kept: list[dict[str, Any]] = []
        texts: Mapping[str, str] | None = None
        for line in latents:
            name, fact = line["id"], new.sources.get(line["id"])
            stamp = line.get("stamp")
            if stamp is None and before[line["position"] : line["position"] + 1] == [name]:
                stamp = old.sources[name].stamp
            if fact is None or stamp != fact.stamp or "asked" in line:
                continue  # removed, changed, or a substitute for another image
            line |= {"position": places[name], "label": fact.label, "stamp": stamp}
            if line["caption_hash"] != fact.caption:
                texts = captions() if texts is None else texts
                line |= {"caption": texts[name], "caption_hash": fact.caption}
            kept.append(line)
        logger.info(
            "the cache %s is brought up to date (%s): %d of its %d latents are kept",
            self.folder,
            "; ".join(found) or "an earlier update was interrupted",
            len(kept),
            len(latents),
        )
        needed = {caption_key(""), *(fact.caption for fact in new.sources.values())}
        index.records = kept + [line for line in index.records if "position" not in line and line["key"] in needed]
        rewrite(self.folder, index)
        atomic_json(self.folder / "cache.json", {"format": self.form, **about})
        new.save(self.folder)

    def key_for(self, position: int, flip: bool) -> str:
        """A unique key for the latent of an image."""
        key = plain = f"{position:09d}{'-flip' if flip else ''}"
        number = 1
        while key in self.done[LATENTS]:
            number += 1
            key = f"{plain}-{number}"
        return key

    @property
    def complete(self) -> bool:
        """Whether the cache is finished."""
        return self.index.complete is not None

    def add(self, kind: str, record: Record) -> None:
        """Add a record; it is on disk once its shard is closed or :meth:`flush` was called."""
        if record.key in self.done[kind]:
            raise DavaeError(f"the cache {self.folder} holds '{record.key}' already")
        self.done[kind].add(record.key)
        waiting = self._waiting[kind]
        if not waiting:
            self._since[kind] = time.monotonic()
        waiting.append(Record(record.key, stored(record.tensors, self.dtype, widen=kind == LATENTS), record.facts))
        full = len(waiting) >= self.shard_records or sum(r.nbytes for r in waiting) >= self.shard_bytes
        if full or time.monotonic() - self._since[kind] >= self.shard_seconds:
            self._write(kind)

    def flush(self) -> None:
        """Write the shards that are not full yet."""
        for kind in self._waiting:
            self._write(kind)

    def finish(self, notes: dict[str, Any]) -> None:
        """Write the remaining records and mark the cache as complete.

        Call it in the first process only, after the others have flushed.
        """
        self.flush()
        if not self.complete:
            merge_journals(self.folder)
            append(self.folder, [{"complete": notes}])
            self.index.complete = notes

    def _write(self, kind: str) -> None:
        records = self._waiting[kind]
        if not records:
            return
        path = self.folder / f"{kind}-{self._next[kind]:05d}{SUFFIXES[self.form]}"
        self._next[kind] += self._every
        lines = write_shard(path, records)
        commit = {"entries": len(lines), "bytes": path.stat().st_size, "sha256": file_hash(path)}
        append(self.folder, [*lines, {"commit": path.name, **commit}], self._journal)
        self.index.records += lines
        self.index.shards[path.name] = commit
        self._waiting[kind] = []


def _fits(line: dict[str, Any], made_of: Fingerprint, names: list[str]) -> bool:
    """Whether a kept latent agrees with the fingerprint of the updated cache."""
    if "stamp" not in line:  # written for this very fingerprint
        return True
    name = line["id"]
    fact = (line["stamp"], line["label"], line["caption_hash"])
    return names[line["position"] : line["position"] + 1] == [name] and made_of.sources[name] == fact


def _first_free(shards: Iterable[str], kind: str) -> int:
    """The first unused shard number of a kind."""
    numbers = [int(Path(name).stem.partition("-")[2]) for name in shards if name.startswith(f"{kind}-")]
    return max(numbers, default=-1) + 1


def read_about(folder: Path) -> dict[str, Any]:
    """Read ``cache.json``: the format, and the writer's ``about`` values.

    Raises:
        DavaeError: it is missing or damaged.
    """
    try:
        return read_object(folder / "cache.json")
    except DavaeError as error:
        raise DavaeError(f"{error}: {MAKE_AGAIN}") from error
