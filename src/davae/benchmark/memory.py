"""The most memory that tensors take during a call, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_tensor_bytes(fn: Callable[[], object], device: str = "cpu") -> int:
    """Largest number of bytes that tensors made during a call hold at one time.

    On a GPU it is what torch's allocator counts. Elsewhere the storages of all results are followed while they
    live; scratch space inside one operation does not show.

    Args:
        fn: what to run; called once.
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
    """Counts the storages of results from their making to their end."""

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
            if key not in self._known and key not in before:  # else a view, or written in place
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
