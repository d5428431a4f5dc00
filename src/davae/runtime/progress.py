"""A progress bar with rate, remaining time and losses; log lines where standard error is no terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from davae.runtime.console import PlainConsole

logger = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 20.0
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
        return f"about {f'{left:.0f} s' if left < 100 else f'{left / 60:.0f} min'} left"


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
        self._losses = self._whole = ""
        console = PlainConsole(stderr=True)
        self._bar: RichProgress | None = None
        if enabled and console.is_terminal:
            self._bar = RichProgress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[whole]}{task.fields[rate]}  {task.fields[losses]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task(name, total=total, completed=start, whole="", rate="", losses="")

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
        """Show the first four values, without learning rate and gradient norm, beside the bar."""
        shown = [(k, v) for k, v in values.items() if k not in {"learning_rate", "gradient_norm"}]
        self._losses = "  ".join(f"{k} {v:.4g}" for k, v in shown[:4])

    def advance(self) -> None:
        """Count one more step as done."""
        self.done += 1
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9) / max(1, self.done - self._first)
        rate = f"{1 / seconds:.2f} steps/s" if seconds < 1 else f"{seconds:.2f} s/step"
        if Phases.current is not None:
            Phases.current.advanced(self.name, (self.done - self._first) / max(1, self.total - self._first))
            self._whole = f"{Phases.current.name}: {Phases.current.told()}  "
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, whole=self._whole, rate=rate, losses=self._losses)
        elif self.enabled and (now - self._last_line > _SECONDS_BETWEEN_LINES or self.done == self.total):
            self._last_line = now
            left = seconds * (self.total - self.done)
            line = "%s %d/%d  %s  %.0f s left  %s%s"
            logger.info(line, self.name, self.done, self.total, rate, left, self._whole, self._losses)
