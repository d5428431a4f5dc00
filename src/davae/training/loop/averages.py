"""Averages over steps: means of losses between two logged lines, and exponential moving averages of weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from davae.training.engine.tensors import like


class RunningMeans:
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


class Ema:
    """``average <- d average + (1 - d) weight`` after every step, kept in float32.

    The decay is warmed up as ``d = min(decay, (1 + n) / (10 + n))`` for the n-th update, so that a short
    training is not dominated by its first weights.

    Averages of sharded parameters are sharded alike: every process keeps its own part.

    Args:
        parameters: the trained parameters, in a fixed order.
        decay: final decay in [0, 1).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.updates = 0
        self.averages = [p.detach().float().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = [p.detach().float() for p in self.parameters]
        torch._foreach_lerp_(self.averages, current, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the parameters hold the averages; afterwards their own values again."""
        own = [p.detach().clone() for p in self.parameters]
        self._write(self.averages)
        try:
            yield
        finally:
            self._write(own)

    def tensors(self) -> dict[str, Tensor]:
        """The averages by number, as a checkpoint keeps them."""
        return {str(i): average for i, average in enumerate(self.averages)}

    def restore(self, saved: dict[str, Tensor], updates: int) -> None:
        """Put whole averages written from :meth:`tensors` back, and the number of updates that made them."""
        self.updates = updates
        self.averages = [like(saved[name], average) for name, average in self.tensors().items()]

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values):
            parameter.copy_(value)
