"""Whose a folder is: every verb claims the one it writes, and takes none that is somebody else's.

A folder is new, or empty, or of the kind that is written: a run goes on in a run, a cache in a cache. It is known by a
hidden file, the mark, or by what earlier versions left in it. While it is written nobody else writes it.
"""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from davae.errors import DavaeError
from davae.runtime.atomic_files import (
    LOCK,
    MARK,
    atomic_folder,
    atomic_json,
    contents,
    disk_full_as_error,
    is_free,
    locked,
    make_folder,
    remove_file,
    remove_if_empty,
    remove_leftovers,
    system_error,
)

KindName = Literal[
    "run", "base run", "demo", "cache", "ablation", "generation", "images", "comparison", "inspection", "pipeline",
    "adapters", "result",
]  # fmt: skip


_LOG = re.compile(r"(.+\.)?(log|out|err)")  # what a shell or a scheduler has begun to write beside what a verb will
_LONGEST = 60  # letters of a text in its name
_SPECIAL = re.compile(r"(.* )?[0-9a-f]{12}|con|prn|aux|nul|(com|lpt)[0-9]")  # looks told apart; Windows' devices
_ADAPTERS = ("davae_adapter.safetensors", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class _Kind:
    """What a verb writes.

    Attributes:
        what: for errors.
        whole: written in one go, the folder whole or as before; else over time and continued, with the mark in it.
        again: a folder of this kind may be written again.
        known_by: whether a folder without a mark, of an earlier version or to be handed on, is of this kind.
        kept: what a full disk has not destroyed, for the error.
        owns: names in such a folder that are written anew, or go; what else it holds stays. For what is whole.
    """

    what: str
    whole: bool = False
    again: bool = True
    known_by: Callable[[Path], bool] = lambda folder: False
    owns: Callable[[Path], Iterable[str]] = lambda folder: ()
    kept: str = "What was written before is whole"


def _says(file: Path, *keys: str) -> bool:
    """Whether a JSON file is one of davae's by what it says; its name alone others may use too."""
    return set(keys) <= _json(file).keys()


def _holds(name: str, *keys: str) -> Callable[[Path], bool]:
    return lambda folder: _says(folder / name, *keys)


def _is_run(folder: Path) -> bool:
    """A training's folder: its environment names davae's version. One with levels holds runs."""
    packages = _json(folder / "environment.json").get("packages")
    return (isinstance(packages, dict) and "davae" in packages) or any(map(_is_run, folder.glob("level-*")))


def _holds_runs(*names: str) -> Callable[[Path], bool]:
    return lambda folder: any(_is_run(folder / name) for name in names)


def _is_upgraded(folder: Path) -> bool:
    """A pipeline with an autoencoder of davae: not its base."""
    return _json(folder / "vae" / "config.json").get("_class_name") == "AutoencoderDA"


_KINDS: dict[KindName, _Kind] = {
    "run": _Kind("a training run", known_by=_is_run, kept="Its checkpoints are whole"),
    "base run": _Kind("the training of a base", known_by=_holds_runs("autoencoder", "transformer")),
    "demo": _Kind("a demo", known_by=_holds_runs("autoencoder", "diffusion")),
    "cache": _Kind(
        "a cache",
        known_by=lambda f: (
            _says(f / "fingerprint.json", "facts", "hash") or _says(f / "cache.json", "format", "classes")
        ),
        kept="The shards that were written are whole",
    ),
    "ablation": _Kind("an ablation", known_by=_holds("ablation.recipe.json", "variants", "seeds")),
    "generation": _Kind(
        "images of an evaluation",
        known_by=lambda f: any(_says(s, "pipeline", "prompts", "seed") for s in f.glob("*/settings.json")),
    ),
    "images": _Kind("generated images"),
    "comparison": _Kind(
        "a comparison",
        whole=True,
        known_by=_holds("comparison.json", "autoencoders", "resolution"),
        owns=lambda f: ("comparison.json", "reconstructions.png", "samples.png"),
    ),
    "inspection": _Kind(
        "an inspection",
        whole=True,
        known_by=lambda f: any("psnr" in found for found in _json(f / "inspection.json").values()),
        owns=lambda f: (
            "inspection.json",
            *(f"{n}.png" for n in ("map", "spectra", "channels", "details", "examples")),
        ),
    ),
    "pipeline": _Kind(
        "an upgraded pipeline",
        whole=True,
        known_by=_is_upgraded,
        owns=lambda f: ("README.md", "pipeline.py", "model_index.json", *_json(f / "model_index.json")),
    ),
    "adapters": _Kind(
        "adapters",
        whole=True,
        known_by=lambda f: (f / _ADAPTERS[0]).is_file() or contents(f) == {"autoencoder"},
        owns=lambda f: _ADAPTERS,
    ),
    "result": _Kind("a result", whole=True, again=False),
}


@contextmanager
def claim(folder: str | Path, kind: KindName) -> Iterator[Path]:
    """Within the block the folder is this process's to write: yields where.

    A kind that is written in one go is written in a hidden folder, which takes the name at the end; what else the old
    one held is kept. A kind that is written over time is written in the folder itself, under its lock and with its
    mark; where nothing was written in the end, nothing is left behind.

    Args:
        folder: of the output; made where absent.
        kind: what is written.

    Raises:
        DavaeError: the folder is somebody else's or another kind's, is in use, or cannot be written; or the disk is
            full.
    """
    place, made = Path(folder), _KINDS[kind]
    check_place(place, kind)
    kept = "Nothing is left half-written" if made.whole else made.kept
    with disk_full_as_error(place, kept), ExitStack() as opened:
        if made.whole:
            with _telling(place):
                keep = partial(_others, place, made)
                inside = opened.enter_context(atomic_folder(place, replace=made.again, keep=keep))
                check_place(place, kind)
            yield inside
            return
        new = not place.exists()
        with _telling(place):
            make_folder(place)
            opened.enter_context(locked(place / LOCK, lambda: _in_use(place)))
            check_place(place, kind)  # another may have begun in between
            remove_leftovers(place)
            _write_mark(place, kind)
        try:
            yield place
        finally:
            if place.is_dir() and not contents(place):
                remove_file(place / MARK)
                remove_file(place / LOCK)
                if new:
                    remove_if_empty(place)


def check_place(folder: str | Path, kind: KindName) -> None:
    """Whether :func:`claim` would take a folder; for the time before models are loaded. Writes nothing.

    Raises:
        DavaeError: it is a file, cannot be written, or is somebody else's or another kind's.
    """
    folder, made = Path(folder), _KINDS[kind]
    check_writable(folder / "any")
    with _telling(folder):
        if is_free(folder):
            return
        if not made.whole and all(_LOG.fullmatch(name) for name in contents(folder)):
            return
    held, found = str(_mark(folder).get("kind", "")), sorted(contents(folder))
    shown = ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")
    if not made.again:
        raise DavaeError(
            f"{folder} is not empty, it holds files already ({shown}): choose another --out, or remove the folder"
        )
    if held == kind or (not held and made.known_by(folder)):
        return
    others = [k.what for name, k in _KINDS.items() if name == held or (not held and k.known_by(folder))]
    whose = others[0] if others else "files that are not davae's"
    raise DavaeError(
        f"{folder} holds {whose} ({shown}), and {made.what} is written to a folder of its own: name a new or an empty "
        "one with --out"
    )


def check_writable(file: Path) -> None:
    """Whether a file can be made there, with the folders above it.

    Raises:
        DavaeError: a folder above it is a file, or may not be written.
    """
    # os.path is False below a folder that may not be entered, where Path raises PermissionError (Python 3.11)
    above = next(parent for parent in file.absolute().parents if os.path.exists(parent))
    if not os.path.isdir(above):
        raise DavaeError(f"{file.parent} cannot be a folder: {above} is a file. Name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise DavaeError(f"{file.parent} cannot be written: you may not write in {above}. Name another place")


def safe_name(text: str) -> str:
    """A name for a file or a folder: two texts never have the same one, whatever the disk thinks of upper case.

    Words of plain small letters and digits with a space between are joined by hyphens. Any other text (and one that
    Windows keeps for devices) is told apart by the first digits of its SHA-256.
    """
    if re.fullmatch(r"[a-z0-9_]+( [a-z0-9_]+)*", text) and len(text) <= _LONGEST and not _SPECIAL.fullmatch(text):
        return text.replace(" ", "-")
    words = re.sub(r"\W+", "-", text.lower())[:_LONGEST].encode()[: 2 * _LONGEST].decode(errors="ignore").strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{words}-{digest}" if words else digest


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Errors of the system while a folder is claimed name the folder."""
    try:
        yield
    except OSError as error:
        raise DavaeError(f"{folder} cannot be written: {system_error(error)}. Name another place") from error


def _others(folder: Path, kind: _Kind) -> set[str]:
    """What a folder that is written anew holds besides."""
    return contents(folder) - set(kind.owns(folder)) if kind.again and folder.is_dir() else set()


def _write_mark(folder: Path, kind: KindName) -> None:
    atomic_json(folder / MARK, {"kind": kind, "writer": f"process {os.getpid()} on {platform.node()}"})


def _mark(folder: Path) -> dict[str, Any]:
    return _json(folder / MARK)


def _in_use(folder: Path) -> str:
    who = _mark(folder).get("writer", "another process")
    return f"{folder} is in use: {who} writes there; wait for it, stop it, or choose another --out"


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none or it cannot be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
