"""Ownership of output folders: every command claims the folder it writes, and refuses folders with other contents.

A folder may be new, empty, or of the same kind of output: a run continues in a run, a cache in a cache. The kind is
known from a hidden file, the mark, or from what earlier versions wrote. A lock excludes concurrent writers.
"""

import hashlib
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
from davae.runtime.text_files import read_object

KindName = Literal[
    "run", "base run", "demo", "cache", "ablation", "generation", "images", "comparison", "inspection", "pipeline",
    "adapters", "result",
]  # fmt: skip


_LOG = re.compile(r"(.+\.)?(log|out|err)")  # log files that a shell or a scheduler writes into the folder
_LONGEST = 60  # characters of a text that its name keeps
_SPECIAL = re.compile(
    r"(.* )?[0-9a-f]{12}|con|prn|aux|nul|(com|lpt)[0-9]"
)  # ends like a hashed name, or is a Windows device
_ADAPTERS = ("davae_adapter.safetensors", "pytorch_lora_weights.safetensors")


@dataclass(frozen=True)
class _Kind:
    """A kind of output.

    Attributes:
        what: name for errors.
        whole: written atomically; otherwise incrementally, with the mark in the folder, and continued if interrupted.
        again: a folder of this kind may be written again.
        known_by: whether a folder without a mark (of an earlier version, or to be shared) is of this kind.
        kept: what a full disk has not destroyed, for the error.
        owns: for whole kinds, names in the folder that are replaced or removed; other entries are kept.
    """

    what: str
    whole: bool = False
    again: bool = True
    known_by: Callable[[Path], bool] = lambda folder: False
    owns: Callable[[Path], Iterable[str]] = lambda folder: ()
    kept: str = "What was written before is whole"


def _says(file: Path, *keys: str) -> bool:
    """Whether a JSON file has all these keys; other programs may use the same file name."""
    return set(keys) <= _json(file).keys()


def _holds(name: str, *keys: str) -> Callable[[Path], bool]:
    return lambda folder: _says(folder / name, *keys)


def _is_run(folder: Path) -> bool:
    """Whether this is a run: its environment names davae's version, or it has such runs for levels."""
    packages = _json(folder / "environment.json").get("packages")
    return (isinstance(packages, dict) and "davae" in packages) or any(map(_is_run, folder.glob("level-*")))


def _holds_runs(*names: str) -> Callable[[Path], bool]:
    return lambda folder: any(_is_run(folder / name) for name in names)


def _is_upgraded(folder: Path) -> bool:
    """Whether this is a pipeline with an :class:`AutoencoderDA`, and not a base."""
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
        known_by=lambda f: any(
            isinstance(found, dict) and "psnr" in found for found in _json(f / "inspection.json").values()
        ),
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


_SIGNS = {
    "environment.json", "fingerprint.json", "cache.json", "ablation.recipe.json", "comparison.json", "inspection.json",
    "model_index.json",
}  # fmt: skip
"""Files of which every folder without a mark that is known by what it holds has one, but for those that hold runs."""


@contextmanager
def claim(folder: str | Path, kind: KindName) -> Iterator[Path]:
    """Claim a folder for the duration of the block; yields the path to write to.

    Kinds written atomically go to a hidden folder, which replaces the old one at the end; unrelated entries of the old
    one are kept. Kinds written incrementally go to the folder itself, under its lock and with its mark; if nothing was
    written, nothing is left behind.

    Args:
        folder: for the output; created if absent.
        kind: of the output.

    Raises:
        DavaeError: the folder holds something else, is in use, or cannot be written; or the disk is full.
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
            check_place(place, kind)  # another process may have started in between
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
    """Check, before models are loaded, that :func:`claim` would accept a folder. Writes nothing.

    Raises:
        DavaeError: it is a file, cannot be written, or holds something else.
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
        f"{folder} holds {whose} ({shown}), and the output is {made.what}, which needs a folder of its own: name a new "
        "or an empty one with --out"
    )


def is_of_davae(folder: Path, files: Iterable[str]) -> bool:
    """Whether a verb wrote a folder.

    Args:
        folder: any.
        files: names of the files in it, which decide for most folders.
    """
    if MARK in files:
        return True
    run_or_cache = ({"config.yaml", "environment.json"}, {"fingerprint.json", "index.jsonl"})
    if any(names.issubset(files) for names in run_or_cache):  # damaged ones too
        return True
    return bool(_SIGNS & set(files)) and any(kind.known_by(folder) for kind in _KINDS.values())


def check_writable(file: Path) -> None:
    """Check that a file can be created at this path, with its parent folders.

    Raises:
        DavaeError: a folder above it is a file, or is not writable.
    """
    # below a folder without permission os.path.exists is false, where Path.exists raises PermissionError (Python 3.11)
    above = next(parent for parent in file.absolute().parents if os.path.exists(parent))
    if not os.path.isdir(above):
        raise DavaeError(f"{file.parent} cannot be a folder: {above} is a file. Name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise DavaeError(f"{file.parent} cannot be written: you may not write in {above}. Name another place")


def safe_name(text: str) -> str:
    """A file or folder name for a text; distinct texts get distinct names, also where case is ignored.

    Words of lower-case ASCII letters, digits and underscores are joined by hyphens. To any other text (and to Windows'
    device names) the first 12 digits of its SHA-256 are appended.
    """
    if re.fullmatch(r"[a-z0-9_]+( [a-z0-9_]+)*", text) and len(text) <= _LONGEST and not _SPECIAL.fullmatch(text):
        return text.replace(" ", "-")
    words = re.sub(r"\W+", "-", text.lower())[:_LONGEST].encode()[: 2 * _LONGEST].decode(errors="ignore").strip("-")
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{words}-{digest}" if words else digest


@contextmanager
def _telling(folder: Path) -> Iterator[None]:
    """Turn system errors in the block into a :class:`DavaeError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise DavaeError(f"{folder} cannot be written: {system_error(error)}. Name another place") from error


def _others(folder: Path, kind: _Kind) -> set[str]:
    """Entries of a folder that are kept when it is written again."""
    return contents(folder) - set(kind.owns(folder)) if kind.again and folder.is_dir() else set()


def _write_mark(folder: Path, kind: KindName) -> None:
    atomic_json(folder / MARK, {"kind": kind, "writer": f"process {os.getpid()} on {platform.node()}"})


def _mark(folder: Path) -> dict[str, Any]:
    return _json(folder / MARK)


def _in_use(folder: Path) -> str:
    who = _mark(folder).get("writer", "another process")
    return f"{folder} is in use: {who} writes there; wait for it, stop it, or choose another --out"


def _json(file: Path) -> dict[str, Any]:
    """A JSON object; empty if there is none or it cannot be read."""
    try:
        return read_object(file)
    except DavaeError:
        return {}
