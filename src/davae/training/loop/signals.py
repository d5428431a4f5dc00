"""Ending a run from outside: Ctrl-C and the scheduler's SIGTERM finish the step, save and leave."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class TrainingStopped(Exception):
    """A run was asked to stop; it has saved and continues from there.

    Args:
        stage: the stage's name.
        step: steps done.
        steps: of all.
        out: the run directory.
        number: the signal that asked.
        result: the stage's result, where it is written: the signal came too late to stop this stage, and keeps the next
            from beginning.

    Attributes:
        signal: the signal that asked.
    """

    def __init__(
        self, stage: str, step: int, steps: int, out: Path, number: signal.Signals, *, result: Path | None = None
    ) -> None:
        self.signal = number
        saved = f"everything is saved in {out}, and the same command continues"
        if result is not None:
            saved = f"its result is written, {result}, and the same command goes on with what is left"
        super().__init__(f"{stage} stopped by {number.name} after step {step} of {steps}; {saved}")


class StopRequest:
    """Notes SIGINT and SIGTERM instead of dying of them; a second SIGINT ends the process at once.

    Used as a context. Signals reach the main thread only, so elsewhere it never hears anything.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
