"""A progress bar with rate, remaining time and losses; log lines where standard error is no terminal."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from davae.runtime.console import PlainConsole

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 20.0


class Progress:
    """Shows the progress of a training or of another long loop.

    Args:
        name: what is running.
        total: number of steps.
        start: steps done earlier.
        enabled: show anything; turn it off in all but the main process.
    """

    def __init__(self, name: str, total: int, start: int = 0, *, enabled: bool = True) -> None:
        self.name, self.total, self.done, self.enabled = name, total, start, enabled
        self._first = start
        self._began = self._last_line = time.monotonic()
        self._losses = ""
        console = PlainConsole(stderr=True)
        self._bar: RichProgress | None = None
        if enabled and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[rate]}  {task.fields[losses]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=start, rate="", losses="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def losses(self, values: dict[str, float]) -> None:
        """Show the first four values, without learning rate and gradient norm, beside the bar."""
        shown = [(k, v) for k, v in values.items() if k not in {"learning_rate", "gradient_norm"}]
        self._losses = "  ".join(f"{k} {v:.4g}" for k, v in shown[:4])

    def advance(self) -> None:
        """Count one more step as done."""
        self.done += 1
        now = time.monotonic()
        seconds = (now - self._began) / max(1, self.done - self._first)
        rate = f"{1 / seconds:.2f} steps/s" if seconds < 1 else f"{seconds:.2f} s/step"
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=rate, losses=self._losses)
        elif self.enabled and (now - self._last_line > _SECONDS_BETWEEN_LINES or self.done == self.total):
            self._last_line = now
            left = seconds * (self.total - self.done)
            logger.info("%s %d/%d  %s  %.0f s left  %s", self.name, self.done, self.total, rate, left, self._losses)
