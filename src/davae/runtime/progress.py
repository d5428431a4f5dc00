"""A progress line with count, time left, rate, memory and losses; log lines where standard error is no terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

import torch
from rich.progress import Progress as RichProgress
from rich.progress import TextColumn
from rich.table import Column

from davae.runtime.console import PlainConsole

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 20.0
_BAR = 20  # characters
_PRIOR_SECONDS = 5.0  # of a pace as expected, so that the first steps decide little


class Phases:
    """The phases of a long command: each is told as it begins, with the time left of the whole.

    Within the ``with`` block the lines and bars of every :class:`Progress` tell the time left of the whole too; those
    of the phase's own name say how much of it is done.

    Args:
        name: of the whole.
        expected: seconds of each phase by name, in order, such as a recorded run took. Their proportions count: how
            fast this machine is shows as soon as something is done.
    """

    current: Phases | None = None
    """The whole that is running in this process."""

    def __init__(self, name: str, expected: Mapping[str, float]) -> None:
        self.name, self.expected = name, dict(expected)
        self.seconds: dict[str, float] = {}
        """What each phase took."""
        self._phase, self._share = "", 0.0
        self._began = self._phase_began = time.monotonic()

    def __enter__(self) -> Phases:
        Phases.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        Phases.current = None
        self._end()

    def begin(self, phase: str) -> None:
        """End the phase before, and tell that this one begins."""
        self._end()
        self._phase = phase
        number = 1 + list(self.expected).index(phase)
        logger.info("%s, %d of %d: %s; %s", self.name, number, len(self.expected), phase, self.told())

    def _end(self) -> None:
        now = time.monotonic()
        if self._phase:
            self.seconds[self._phase] = now - self._phase_began
        self._phase, self._share, self._phase_began = "", 0.0, now

    def resumed(self, loop: str, share: float) -> None:
        """A loop begins with that share of its steps made earlier, which will take no time now."""
        if loop == self._phase:
            self.expected[loop] *= 1 - share

    def advanced(self, loop: str, share: float) -> None:
        """A loop has made that share of the steps that it has to make."""
        if loop == self._phase:
            self._share = share

    def left(self) -> float:
        """Seconds until the last phase ends, at the pace of what is done."""
        done = sum(self.expected[phase] for phase in self.seconds) + self._share * self.expected.get(self._phase, 0)
        pace = (time.monotonic() - self._began + _PRIOR_SECONDS) / (done + _PRIOR_SECONDS)
        return max(sum(self.expected.values()) - done, 0) * pace

    def told(self) -> str:
        """The time left in words."""
        left = self.left()
        if left < 100:
            return f"about {left:.0f} s left"
        return f"about {f'{left / 60:.0f} min' if left < 5400 else f'{left / 3600:.1f} h'} left"


class Progress:
    """Shows the progress of a training or of another long loop.

    Args:
        name: what is running.
        total: number of steps.
        start: steps done earlier.
        images: per step, for images a second; 0 leaves them out.
        enabled: show anything; turn it off in all but the main process.
    """

    def __init__(self, name: str, total: int, start: int = 0, *, images: int = 0, enabled: bool = True) -> None:
        self.name, self.total, self.done, self.images, self.enabled = name, total, start, images, enabled
        self._first = start
        self._began = self._last_line = time.monotonic()
        self._losses: list[str] = []
        self._whole = ""
        console = PlainConsole(stderr=True)
        self._bar: RichProgress | None = None
        if enabled and console.is_terminal:
            column = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="crop"))
            self._bar = RichProgress(column, console=console)
            self._task = self._bar.add_task(f"{name} {start}/{total}", total=total)

    def __enter__(self) -> Progress:
        if Phases.current is not None:
            Phases.current.resumed(self.name, self._first / max(1, self.total))
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def losses(self, values: dict[str, float]) -> None:
        """Show the first four values, without learning rate and gradient norm."""
        shown = [(k, v) for k, v in values.items() if k not in {"learning_rate", "gradient_norm"}]
        self._losses = [f"{k} {v:.4g}" for k, v in shown[:4]]

    def advance(self) -> None:
        """Count one more step as done."""
        self.done += 1
        now = time.monotonic()
        if Phases.current is not None:
            Phases.current.advanced(self.name, (self.done - self._first) / max(1, self.total - self._first))
            self._whole = f"{Phases.current.name}: {Phases.current.told()}"
        if self._bar is not None:
            self._bar.update(self._task, description=self.line(now - self._began, self._bar.console.width))
        elif self.enabled and (now - self._last_line > _SECONDS_BETWEEN_LINES or self.done == self.total):
            self._last_line = now
            logger.info("%s", self.line(now - self._began))

    def line(self, seconds: float, width: int | None = None) -> str:
        """What is shown ``seconds`` after the start: count and time left, and what else fits the ``width``.

        A name that is too long is cut, the count and the time left never are.
        """
        step = seconds / max(1, self.done - self._first)
        needed = f" {self.done}/{self.total}  {_clock(step * (self.total - self.done))} left"
        rate = f"{1 / step:.2f} steps/s" if 0 < step < 1 else f"{step:.2f} s/step"
        more = [
            self._whole,
            rate,
            *([f"{self.images / step:.3g} images/s"] if self.images and step else []),
            *self._losses,
            _memory(),
        ]
        line = (self.name if width is None else self.name[: max(0, width - len(needed))]) + needed
        for part in filter(None, more):
            if width is None or len(line) + 2 + len(part) <= width:
                line += f"  {part}"
        if width is not None and len(line) + _BAR + 2 <= width:
            filled = _BAR * self.done // max(1, self.total)
            line += "  " + "━" * filled + "╌" * (_BAR - filled)
        return line


def _clock(seconds: float) -> str:
    """``2d 03:04:05``, ``3:04:05`` or ``4:05``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _memory() -> str:
    """The most memory so far: of tensors on the GPU, or of the process; empty where it is not known."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 1e9:.3g} GB"
    if sys.platform != "linux":
        return ""
    import resource

    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.3g} GB"
