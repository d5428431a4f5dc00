"""Means of losses between two logged lines, kept on the device until they are read."""

from __future__ import annotations

import torch
from torch import Tensor


class LossWindow:
    """Sums of named values; what is not finite is left out (the guard reports it).

    Args:
        device: of the training, where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], prefix: str = "") -> None:
        """Add 0-dimensional values, under ``<prefix>_<name>`` where there is a prefix."""
        for name, value in values.items():
            key = f"{prefix}_{name}" if prefix else name
            value = value.detach().float().to(self.device)
            finite = value.isfinite()
            self._sums[key] = self._sums.get(key, 0.0) + torch.where(finite, value, 0.0)
            self._counts[key] = self._counts.get(key, 0) + finite.float()

    def tensors(self) -> tuple[list[str], Tensor]:
        """Names, and their sums and counts, float32 ``[names, 2]``."""
        names = list(self._sums)
        columns = [torch.stack([self._sums[n], self._counts[n]]) for n in names]
        return names, torch.stack(columns) if columns else torch.zeros(0, 2, device=self.device)

    def means(self, names: list[str], sums_and_counts: Tensor) -> dict[str, float]:
        """The means of (possibly reduced) sums and counts; begins a new window."""
        self._sums, self._counts = {}, {}
        rows = sums_and_counts.tolist()  # the one wait for the device
        return {name: total / count for name, (total, count) in zip(names, rows) if count}

    def state_dict(self) -> dict[str, list[float]]:
        """Sum and count by name, for a checkpoint between two lines; the window goes on."""
        names, sums_and_counts = self.tensors()
        return dict(zip(names, sums_and_counts.tolist()))

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Go on with a window that :meth:`state_dict` described."""
        self._sums = {n: torch.tensor(total, device=self.device) for n, (total, _) in state.items()}
        self._counts = {n: torch.tensor(count, device=self.device) for n, (_, count) in state.items()}
