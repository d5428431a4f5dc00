"""Means of losses between two logged lines, kept on the device until they are read."""

from __future__ import annotations

import torch
from torch import Tensor


class LossWindow:
    """Sums of named values; what is not finite is left out (the guard reports it)."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], prefix: str = "") -> None:
        """Add 0-dimensional values, under ``<prefix>_<name>`` where there is a prefix."""
        for name, value in values.items():
            key = f"{prefix}_{name}" if prefix else name
            value = value.detach().float()
            finite = value.isfinite()
            self._sums[key] = self._sums.get(key, 0.0) + torch.where(finite, value, 0.0)
            self._counts[key] = self._counts.get(key, 0) + finite.long()

    def tensors(self) -> tuple[list[str], Tensor]:
        """Names, and their sums and counts, float64 ``[names, 2]``."""
        names = list(self._sums)
        columns = [torch.stack([self._sums[n].double(), self._counts[n].double()]) for n in names]
        return names, torch.stack(columns)

    def flush(self) -> dict[str, float]:
        """The means since the last flush; a value that was never finite has none."""
        return self.means(*self.tensors())

    def means(self, names: list[str], sums_and_counts: Tensor) -> dict[str, float]:
        """The means of (possibly reduced) sums and counts; begins a new window."""
        self._sums, self._counts = {}, {}
        rows = sums_and_counts.tolist()  # the one wait for the device
        return {name: total / count for name, (total, count) in zip(names, rows) if count}
