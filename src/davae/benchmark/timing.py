"""Wall-clock time and peak memory, measured for fair comparisons."""

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from davae.errors import DavaeError
from davae.runtime.devices import timed


@dataclass(frozen=True)
class SideBySide:
    """Times of several functions, measured alternately.

    Attributes:
        times: seconds of every round, by name.
    """

    times: dict[str, list[float]]

    @property
    def medians(self) -> dict[str, float]:
        """Median seconds by name."""
        return {name: median(times) for name, times in self.times.items()}

    def speedup(self, name: str, over: str) -> float:
        """How many times as fast ``name`` is as ``over``: the median of the ratios of all rounds.

        Ratios within a round cancel slow drift of the machine.

        Raises:
            DavaeError: nothing of that name was timed.
        """
        for key in (name, over):
            if key not in self.times:
                raise DavaeError(f"nothing called {key!r} was timed; there are {', '.join(self.times)}")
        return median(b / a for a, b in zip(self.times[name], self.times[over], strict=True))


def side_by_side(functions: Mapping[str, Callable[[], object]], repeats: int = 5, *, warmup: int = 1) -> SideBySide:
    """Time several functions alternately, so that drift (heat, other jobs) affects them alike.

    Args:
        functions: callables without arguments, by name.
        repeats: number of rounds; each runs every function once, in an order rotated by one each time.
        warmup: rounds before the measured ones.

    Raises:
        DavaeError: no functions, ``repeats`` below 1 or ``warmup`` below 0.
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
            times[name].append(timed(functions[name])[1])
    return SideBySide(times)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes on Linux


def peak_tensor_bytes(fn: Callable[[], object], device: str = "cpu") -> int:
    """Peak memory, in bytes, of the tensors that a call allocates.

    On CUDA devices this is the peak of torch's allocator. Elsewhere the storages of all operators' results are tracked
    over their lifetime; scratch memory inside an operator is not counted.

    Args:
        fn: the call to measure; called once.
        device: where it runs.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Followed() as followed:
        fn()
    return followed.peak


class _Followed(TorchDispatchMode):
    """Tracks the storages of operators' results over their lifetime."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        before = {s._cdata for s in _storages((args, kwargs or {}))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            key = storage._cdata
            if key not in self._known and key not in before:  # otherwise a view, or written in place
                self._known.add(key)
                size = storage.nbytes()
                self.now += size
                weakref.finalize(storage, self._forget, key, size)
        self.peak = max(self.peak, self.now)
        return result

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _storages(tree: Any) -> Iterator[Any]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()
