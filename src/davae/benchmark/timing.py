"""Wall-clock time and peak memory, measured so that two things can be compared fairly."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from davae.errors import DavaeError


def synchronise() -> None:
    """Wait until the accelerator, if there is one, has finished all it was asked to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def _seconds(fn: Callable[[], object]) -> float:
    synchronise()
    start = time.perf_counter()
    fn()
    synchronise()
    return time.perf_counter() - start


@dataclass(frozen=True)
class SideBySide:
    """Times of several functions, measured in turns.

    Attributes:
        times: all measured seconds by name, in order.
    """

    times: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by name."""
        return {name: median(times) for name, times in self.times.items()}

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast ``name`` is as ``over``: the median of the ratios round by round.

        Taking ratios inside a round cancels what slows the whole machine for a while.
        """
        for key in (name, over):
            if key not in self.times:
                raise DavaeError(f"nothing called {key!r} was timed; there are {', '.join(self.times)}")
        return median(b / a for a, b in zip(self.times[name], self.times[over], strict=True))


def side_by_side(
    functions: Mapping[str, Callable[[], object]], repeats: int = 5, *, warmup: int = 1
) -> SideBySide:
    """Time several functions in alternation, so that drift (heat, other jobs) meets them all alike.

    Args:
        functions: name to a call without arguments.
        repeats: rounds; every function runs once a round, the order turning by one each time.
        warmup: rounds before the first that counts.

    Returns:
        The times; see :class:`SideBySide`.

    Raises:
        DavaeError: nothing to time, or counts that make no sense.
    """
    if repeats < 1 or warmup < 0:
        raise DavaeError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    if not functions:
        raise DavaeError("side_by_side was given no function to time")
    names = list(functions)
    for _ in range(warmup):
        for name in names:
            functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(_seconds(functions[name]))
    return SideBySide(times)


def peak_memory_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes on Linux
