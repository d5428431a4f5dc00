"""Writing checkpoints beside the training, so that steps do not wait for the disk."""

from __future__ import annotations

import json
import logging
import math
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from davae.choices import BestMode
from davae.runtime.atomic_files import atomic_write
from davae.training.checkpoints.checkpoint import Tensors, remove_old, save_checkpoint, step_of

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Takes a copy of the state at once and writes it in a thread; keeps the newest ones and the best.

    One checkpoint is written at a time: :meth:`save` waits for the one before. What goes wrong while writing is
    raised by the next call. Used as a context, it finishes writing before it leaves.

    Args:
        folder: the run's ``checkpoints`` folder.
        keep: how many of the newest checkpoints stay.
        best_mode: whether small or large values of the watched metric are good.
    """

    def __init__(self, folder: Path, *, keep: int, best_mode: BestMode = "min") -> None:
        self.folder, self.keep, self.best_mode = folder, keep, best_mode
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None
        self._best_file = folder / "best.json"
        self.best = _read_best(self._best_file) if self._best_file.is_file() else None

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
        """Whether a value of the watched metric beats every one before; one that is not finite never does."""
        if not math.isfinite(value):
            return False
        if self.best is None:
            return True
        return value < self.best["value"] if self.best_mode == "min" else value > self.best["value"]

    def save(
        self,
        step: int,
        tensors: Tensors,
        values: dict[str, Any],
        *,
        watched: float | None = None,
        copied: bool = False,
    ) -> None:
        """Copy the state and begin to write it; returns before it is on the disk.

        Args:
            step: optimizer steps done.
            tensors: file name (without suffix) to named tensors.
            values: everything else, as JSON.
            watched: the watched metric at this step, where it was measured.
            copied: the tensors are copies already, on the CPU, that nobody else will change.

        Raises:
            DavaeError: the checkpoint before could not be written.
        """
        self.wait()
        if not copied:
            tensors = {
                name: {k: v.detach().to("cpu", copy=True) for k, v in named.items()}
                for name, named in tensors.items()
            }
        is_best = watched is not None and self.is_best(watched)
        self._pending = self._pool.submit(self._write, step, tensors, values, watched if is_best else None)

    def check(self) -> None:
        """Raise what went wrong while writing, if it is known by now."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, step: int, tensors: Tensors, values: dict[str, Any], best: float | None) -> Path:
        before = {int(self.best["step"])} if self.best else set()
        path = save_checkpoint(self.folder, step, tensors, values, keep=self.keep, protected=before)
        if best is not None:
            self.best = {"step": step_of(path), "value": best}
            atomic_write(self._best_file, json.dumps(self.best))
            # Only now may the best before go: until the line above the file named it.
            remove_old(self.folder, step, keep=self.keep, protected={step})
        return path


def _read_best(file: Path) -> dict[str, float] | None:
    """Step and value of the best checkpoint; none where the file is damaged, and that checkpoint is as all others."""
    try:
        found = json.loads(file.read_text())
        best = {"step": int(found["step"]), "value": float(found["value"])}
        if not math.isfinite(best["value"]):
            raise ValueError(found)
    except (ValueError, TypeError, KeyError) as error:
        logger.warning(
            "%s cannot be read (%r): the next value of the watched metric is the best", file, error
        )
        return None
    return best
