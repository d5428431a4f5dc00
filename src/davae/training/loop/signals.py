"""Stopping from outside: on Ctrl-C or a scheduler's signal a training finishes the step, saves and exits.

Elsewhere signals raise an exception, so that clean-up code runs and nothing is left half-written.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any


class TrainingStopped(Exception):
    """A run was stopped by a signal; it has saved its state and can be resumed.

    Args:
        stage: the stage's name.
        step: steps done.
        steps: total number of steps.
        out: the run directory.
        number: the signal received.
        result: the stage's result, if it is written: the signal came too late to stop this stage, and only keeps the
            next one from starting.

    Attributes:
        signal: the signal received.
    """

    def __init__(
        self, stage: str, step: int, steps: int, out: Path, number: signal.Signals, *, result: Path | None = None
    ) -> None:
        self.signal = number
        saved = f"everything is saved in {out}, and the same command continues"
        if result is not None:
            saved = f"its result is written to {result}, and the same command continues with what is left"
        super().__init__(f"{stage} stopped by {number.name} after step {step} of {steps}; {saved}")


class Stopped(BaseException):
    """A signal came outside of a training's steps. A ``BaseException``, so that no error handling catches it.

    Attributes:
        signal: the signal received.
    """

    def __init__(self, number: signal.Signals) -> None:
        self.signal = number
        super().__init__(number.name)


_WANTED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C, a scheduler's end, a closed terminal, Slurm's warning (``--signal=USR1@120``); Windows has the first two."""
_Handler = Callable[[int, FrameType | None], None]


@contextmanager
def _heard(handler: _Handler, numbers: tuple[signal.Signals, ...]) -> Iterator[None]:
    """Context in which the signals call ``handler``, except those that the parent process set to be ignored (nohup).

    Python delivers signals to the main thread only; in another thread this does nothing.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, handler_before in before.items():
            if handler_before is not None:  # None: one that was not set from Python cannot be set again
                signal.signal(number, handler_before)


@contextmanager
def ending_by_signals() -> Iterator[None]:
    """Context in which SIGTERM, SIGHUP and SIGUSR1 raise :class:`Stopped`; SIGINT keeps Python's own handler."""

    process = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        if os.getpid() != process:  # a data loader process, which inherits the handlers and has nothing to clean up
            os._exit(128 + number)
        raise Stopped(signal.Signals(number))

    with _heard(end, tuple(number for number in _WANTED if number != signal.SIGINT)):
        yield


class StopRequest:
    """Context manager that records signals; a SIGINT after any of them raises ``KeyboardInterrupt``.

    The first signal is acknowledged on standard error at once, since a step may take long.

    Args:
        quiet: print nothing; for all processes but the first.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._quiet, self._process = quiet, os.getpid()
        self._listening = _heard(self._note, _WANTED)

    def __enter__(self) -> StopRequest:
        self._listening.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.__exit__(kind, error, trace)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is None and not self._quiet and os.getpid() == self._process:
            again = "; again ends it at once" if number == signal.SIGINT else ""
            told = f"\ndavae: {signal.Signals(number).name}: saving and stopping after this step{again}\n"
            os.write(2, told.encode())  # a handler may come in the middle of another write
        self.received = signal.Signals(number)
