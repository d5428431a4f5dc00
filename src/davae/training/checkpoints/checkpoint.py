"""Checkpoints: everything a run needs to resume exactly, in safetensors and JSON.

A checkpoint is a folder ``checkpoints/step-N`` with one ``<name>.safetensors`` for each part (weights, averages,
optimizer moments), ``state.json`` for the plain values and ``manifest.json`` with the size and SHA-256 of each
file. It is written under a temporary name, flushed to disk and then renamed, so a folder named ``step-N`` was
complete when it got its name; the manifest shows whether it still is.
"""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from davae.choices import BestMode
from davae.errors import DavaeError
from davae.runtime.atomic_files import (
    atomic_folder,
    atomic_write,
    file_hash,
    flush,
    is_disk_full,
    make_folder,
    remove_folder,
    remove_leftovers,
)
from davae.runtime.text_files import read_object

logger = logging.getLogger(__name__)
Tensors = dict[str, dict[str, Tensor]]
"""Named tensors, by file name without suffix."""

MANIFEST = "manifest.json"
_STATE = "state.json"
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    folder: Path, step: int, tensors: Tensors, values: dict[str, Any], *, keep: int, protected: Collection[int] = ()
) -> Path:
    """Write ``folder/step-<step>`` and remove all but the newest ``keep`` checkpoints and the ``protected`` ones.

    Args:
        folder: the run's ``checkpoints`` folder.
        step: optimizer steps done.
        tensors: named tensors by file name (without suffix).
        values: everything else, serialisable as JSON.
        keep: how many checkpoints to keep, at least 1.
        protected: steps whose checkpoints are kept in addition.

    Raises:
        DavaeError: the disk is full; earlier checkpoints are untouched.
    """
    final = folder / f"step-{step}"
    try:
        remove_leftovers(make_folder(folder))  # of a run that was killed
        with atomic_folder(final) as partial:
            for name, named in tensors.items():
                save_file({k: v.detach().cpu().contiguous() for k, v in named.items()}, partial / f"{name}.safetensors")
            (partial / _STATE).write_text(json.dumps({"step": step, **values}), encoding="utf-8")
            files = {file.name: _facts(file) for file in sorted(partial.iterdir())}
            (partial / MANIFEST).write_text(json.dumps(files, indent=1), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise DavaeError(_full_message(folder, step, tensors)) from error
    flush(folder.parent)  # may be new, too
    remove_old(folder, step, keep=keep, protected=protected)
    return final


def remove_old(folder: Path, step: int, *, keep: int, protected: Collection[int] = ()) -> None:
    """Remove all but the newest ``keep`` checkpoints up to ``step`` and the ``protected`` ones.

    Checkpoints of later steps are left alone and not counted: they come from an earlier start of the run and were found
    broken, or the run would have resumed from them.
    """
    reached = [path for path in checkpoints(folder) if step_of(path) <= step]
    for old in reached[:-keep]:
        if step_of(old) not in protected:
            remove_folder(old)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; :func:`load_checkpoint` checks whether they are complete."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_whole(folder: Path, needed: Collection[str] = ()) -> tuple[Path, Tensors, dict[str, Any]] | None:
    """Path, tensors and values of the newest whole checkpoint; ``None`` if there are no checkpoints.

    Broken ones are logged and skipped. ``needed`` names :data:`Tensors` that a checkpoint must have.

    Raises:
        DavaeError: there are checkpoints and none is whole; starting again would overwrite what is left of them.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            return path, *load_checkpoint(path, needed)
        except DavaeError as error:
            logger.warning("%s", error)
    if found:
        raise DavaeError(
            f"none of the {len(found)} checkpoints in {folder} is whole; move the folder away to start again"
        )
    return None


def plain_values(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint, unchecked; empty if they cannot be read."""
    try:
        return read_object(path / _STATE)
    except DavaeError:
        return {}


def load_checkpoint(path: Path, needed: Collection[str] = ()) -> tuple[Tensors, dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote: tensors by file name, and the plain values.

    Args:
        path: the checkpoint.
        needed: names of :data:`Tensors` that it must have.

    Raises:
        DavaeError: a file is missing or differs from the manifest, or the manifest itself cannot be read.
    """
    try:
        manifest = _manifest(path, needed)
        for name, facts in manifest.items():
            if Path(name).name != name:
                raise DavaeError(f"checkpoint {path} is broken: its manifest names {name}, which lies elsewhere")
            if _facts(path / name) != facts:
                raise DavaeError(f"checkpoint {path} is broken: {name} is not what was written; not used")
        values = read_object(path / _STATE)
        tensors = {Path(n).stem: load_file(path / n) for n in manifest if n.endswith(".safetensors")}
    except DavaeError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: not JSON, not UTF-8, or not a file name
        raise DavaeError(f"checkpoint {path} is broken: it cannot be read ({error}); not used") from error
    return tensors, values


def _manifest(path: Path, needed: Collection[str]) -> dict[str, Any]:
    """Size and hash by file name, checked to list the state and the ``needed`` files."""
    try:
        manifest = read_object(path / MANIFEST)
    except DavaeError as error:
        raise DavaeError(f"checkpoint {path} is broken: {error}; not used") from error
    for file in (_STATE, *(f"{name}.safetensors" for name in needed)):
        if file not in manifest:
            raise DavaeError(f"checkpoint {path} is broken: its {MANIFEST} lacks {file}; not used")
    return manifest


def _facts(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": file_hash(file)}


def _full_message(folder: Path, step: int, tensors: Tensors) -> str:
    needed = sum(t.numel() * t.element_size() for named in tensors.values() for t in named.values())
    kept = checkpoints(folder)
    return (
        f"the disk is full: the checkpoint of step {step} needs {needed / 1e6:.0f} MB, "
        f"{shutil.disk_usage(folder).free / 1e6:.0f} MB are free in {folder}. "
        + (f"{kept[-1].name} is whole" if kept else "There is no older checkpoint")
        + "; make room (or lower loop.checkpoints_total_limit) and run the same command again"
    )


class CheckpointWriter:
    """Copies the state at once and writes it in a thread; keeps the newest checkpoints and the best one.

    One checkpoint is written at a time: :meth:`save` waits for the previous one. Errors while writing are raised by the
    next call. As a context manager it finishes writing before it exits.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep: how many of the newest checkpoints to keep.
        best_metric: name of the watched metric; the best of another one, or by another ``best_mode``, does not count.
        best_mode: whether lower (``min``) or higher (``max``) values of the watched metric are better.
    """

    def __init__(self, folder: Path, *, keep: int, best_metric: str | None = None, best_mode: BestMode = "min") -> None:
        self.folder, self.keep, self.best_mode = folder, keep, best_mode
        self._watched = {"metric": best_metric, "mode": best_mode}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._best_file = folder / "best.json"
        self.best = _read_best(self._best_file, self._watched) if self._best_file.is_file() else None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def is_best(self, value: float) -> bool:
        """Whether a value of the watched metric is the best so far; a value that is not finite never is."""
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        return value < self.best["value"] if self.best_mode == "min" else value > self.best["value"]

    def save(self, step: int, tensors: Tensors, values: dict[str, Any]) -> None:
        """Start writing a checkpoint; returns before it is on disk.

        Args:
            step: optimizer steps done.
            tensors: file name (without suffix) to named tensors on the CPU, which must not change until :meth:`wait`.
            values: everything else, as JSON.

        Raises:
            DavaeError: the disk was full when the previous checkpoint was written.
        """
        self.wait()
        self._pending = self._pool.submit(self._write, step, tensors, values)

    def keep_best(self, step: int, value: float) -> None:
        """Keep the newest checkpoint, of ``step``, as the best so far instead of the previous best.

        Raises:
            DavaeError: the disk was full when it was written.
        """
        self.wait()
        self.best = {"step": step, "value": value}
        atomic_write(self._best_file, json.dumps(self.best | self._watched))
        # Only now may the previous best be removed: until the line above, the file named it.
        remove_old(self.folder, step, keep=self.keep, protected={step})

    def check(self) -> None:
        """Raise the error of the last checkpoint if it has failed by now; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is on disk; raises its error if writing failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, tensors: Tensors, values: dict[str, Any]) -> Path:
        best = {int(self.best["step"])} if self.best else set()
        return save_checkpoint(self.folder, step, tensors, values, keep=self.keep, protected=best)


def _read_best(file: Path, watched: dict[str, str | None]) -> dict[str, float] | None:
    """Step and value of the best checkpoint; ``None`` if the file is damaged, so that no checkpoint is protected, or
    of another metric than the ``watched`` one (an earlier version did not note which)."""
    try:
        found = read_object(file)
        if any(found.get(key, value) != value for key, value in watched.items()):
            return None
        best = {"step": int(found["step"]), "value": float(found["value"])}
        if not math.isfinite(best["value"]):
            raise ValueError(found)
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%r): the next value of the watched metric counts as the best", file, error)
        return None
    return best
