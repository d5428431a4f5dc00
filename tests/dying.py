"""A process that dies at its n-th change of what is on the disk: nothing after it happens, no tidying up either."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.chmod", "os.truncate"}


class Killed(BaseException):
    """As a kill."""


class _Death:
    """Counts changes below a folder, and kills at one of them."""

    def __init__(self) -> None:
        self.below: str | None = None
        self.left = self.seen = 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.below is None or not (event in _CHANGES or (event == "open" and self._writes(*arguments))):
            return
        if not str(os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else "").startswith(self.below):
            return
        self.seen += 1
        if self.seen > self.left:
            raise Killed

    @staticmethod
    def _writes(path: Any, mode: str | None, flags: int) -> bool:
        return isinstance(path, str | bytes) and bool(flags & (os.O_WRONLY | os.O_RDWR))


_DEATH = _Death()
sys.addaudithook(_DEATH)


@contextmanager
def dying_after(changes: int, below: Path) -> Iterator[_Death]:
    """Within the block the first so many changes below a folder happen, and no other."""
    _DEATH.below, _DEATH.left, _DEATH.seen = str(below), changes, 0
    try:
        yield _DEATH
    except Killed:
        pass
    finally:
        _DEATH.below = None


def every_death(work: Callable[[], None], below: Path, start: Callable[[], None]) -> Iterator[int]:
    """Start anew, work and die at the first change, at the second ...; yields after each death, then after a life."""
    for number in range(1000):
        start()
        with dying_after(number, below) as death:
            work()
        yield number
        if death.seen <= number:
            return
    raise AssertionError("it never comes to an end")
