"""The fingerprint of what a cache was computed from, so that training never uses a cache of something else.

A fingerprint has two parts. The *facts* are a tree of plain values: hashes of weights, configurations, the rule by
which images become tensors, the storage type. The *sources* hold for each image what changes when it does: the file's
size and modification time, its label and a hash of its caption. A comparison must not read a whole data set; only where
times alone differ, a hash of the contents in the index decides. Differences have names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from davae.data.cache.shards import MAKE_AGAIN
from davae.errors import DavaeError, first_names
from davae.runtime.atomic_files import atomic_file, atomic_json, remove_file
from davae.runtime.text_files import plain_json

_NAMED = 3
_SOURCES = re.compile(r"sources(-[0-9a-f]{8})?\.jsonl")


class SourceFact(NamedTuple):
    """One image: ``stamp`` (size and modification time), label, hash of the caption."""

    stamp: str
    label: int
    caption: str


@dataclass(frozen=True)
class Fingerprint:
    """What a cache was computed from.

    Attributes:
        facts: a tree of plain values (dictionaries, lists, text, numbers).
        sources: image id -> what is known about it, in the order of the data set.
    """

    facts: Mapping[str, Any]
    sources: Mapping[str, SourceFact] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """SHA-256 of facts and sources, 64 hexadecimal digits."""
        plain = json.dumps([self.facts, list(self.sources.items())], sort_keys=True)
        return hashlib.sha256(plain.encode("utf-8", "surrogateescape")).hexdigest()

    def differences(self, wanted: Fingerprint) -> list[str]:
        """What differs in ``wanted``, as text: ``data.resolution: 64 -> 128``; empty if both are equal."""
        return self.fact_differences(wanted) + self._source_differences(wanted)

    def fact_differences(self, wanted: Fingerprint) -> list[str]:
        """Differences in models and settings, which change every latent."""
        here, there = dict(_leaves(self.facts)), dict(_leaves(wanted.facts))
        found = []
        for name in [*here, *(n for n in there if n not in here)]:
            a, b = here.get(name, _ABSENT), there.get(name, _ABSENT)
            if a != b:
                found.append(name if _is_hash(a) and _is_hash(b) else f"{name}: {_shown(a)} -> {_shown(b)}")
        return found

    def check(self, wanted: Fingerprint, where: Path) -> None:
        """Raise an error if the cache is not the wanted one.

        Raises:
            DavaeError: naming everything that differs.
        """
        found = self.differences(wanted)
        if found:
            advice = "Use the settings it was made with, or make another with `davae cache --out`"
            if not self.fact_differences(wanted):
                advice = "Give the same `davae cache` command again: it encodes what is new and keeps the rest"
            raise DavaeError(
                f"the cache {where} was made of something else (cached -> wanted): {'; '.join(found)}. {advice}"
            )

    def save(self, folder: Path) -> None:
        """Write the sources, then ``fingerprint.json``, which names their file: after a kill either pair is whole."""
        name = "sources.jsonl"
        if (folder / "fingerprint.json").exists():
            name = f"sources-{self.hash[:8]}.jsonl"
        with atomic_file(folder / name) as partial, partial.open("w", encoding="utf-8") as file:
            for source, fact in self.sources.items():
                file.write(json.dumps([source, *fact]) + "\n")
        atomic_json(folder / "fingerprint.json", {"facts": self.facts, "hash": self.hash, "sources": name})
        for other in folder.glob("sources*.jsonl"):
            if other.name != name:
                remove_file(other)

    @classmethod
    def load(cls, folder: Path) -> Fingerprint:
        """Read what :meth:`save` wrote.

        Raises:
            DavaeError: the files are missing, damaged or do not belong together.
        """
        try:
            saved = plain_json((folder / "fingerprint.json").read_bytes())
            sources = {}
            sources_file = str(saved.get("sources", "sources.jsonl"))
            if not _SOURCES.fullmatch(sources_file):
                raise ValueError(f"{sources_file!r} is no name of its sources")
            with (folder / sources_file).open("rb") as file:
                for line in file:
                    name, stamp, label, caption = plain_json(line)
                    sources[name] = SourceFact(stamp, label, caption)
            found = cls(saved["facts"], sources)
            same = found.hash == saved["hash"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            told = f"the fingerprint of the cache {folder} cannot be read ({error}): {MAKE_AGAIN}"
            if not (folder / "fingerprint.json").exists():
                told = f"{folder} is no cache of latents: make one with `davae cache --out {folder}` and this recipe"
            raise DavaeError(told) from error
        if not same:
            raise DavaeError(f"the fingerprint of the cache {folder} was changed by hand: {MAKE_AGAIN}")
        return found

    def _source_differences(self, wanted: Fingerprint) -> list[str]:
        ours, theirs = self.sources, wanted.sources
        shared = [name for name in theirs if name in ours]
        changed = [n for n in shared if ours[n].stamp != theirs[n].stamp]
        captions = [n for n in shared if ours[n].caption != theirs[n].caption]
        labels = [n for n in shared if ours[n].label != theirs[n].label]
        found = [
            _count("file", "changed", changed),
            _count("caption", "changed", captions),
            _count("label", "changed", labels),
            _count("file", "added", [n for n in theirs if n not in ours]),
            _count("file", "gone", [n for n in ours if n not in theirs]),
        ]
        same_names = ours.keys() == theirs.keys()
        if same_names and list(ours) != list(theirs):
            found.append("the order of the files")
        return [text for text in found if text]


class _Absent:
    """Stands for a missing value, since None is a value."""


_ABSENT = _Absent()


def weights_hash(module: nn.Module, *, by_dtype: bool = False) -> str:
    """SHA-256 of a module's parameters and persistent buffers: names, shapes and values, whatever file they came from.

    Floating-point values count as float32, so that reading a model in a wider precision than it was saved in does not
    change it.

    Args:
        module: any.
        by_dtype: the hash in caches of the first version, in which the precision counts.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        value = tensor.detach()
        if value.is_floating_point() and not by_dtype:
            value = value.float()
        value = value.cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy() if value.numel() else b"")
    return f"sha256:{digest.hexdigest()}"


def value_hash(value: Any) -> str:
    """SHA-256 of plain values, such as configurations and vocabularies."""
    return f"sha256:{hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()}"


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without its underscore entries: where it was loaded from and by which version."""
    kept = {k: v for k, v in dict(config).items() if not k.startswith("_")}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def caption_key(caption: str) -> str:
    """The name of a caption in a cache: the first 32 hexadecimal digits of its SHA-256."""
    return hashlib.sha256(caption.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    if _is_hash(value):
        return "present"
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _count(what: str, happened: str, names: list[str]) -> str:
    if not names:
        return ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} {happened}: {first_names(names, _NAMED)}"
