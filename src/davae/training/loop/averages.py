"""Averages over steps: means of losses between log lines, and exponential moving averages (EMA) of weights."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from davae.training.engine.tensors import like


class RunningMeans:
    """Means of named values; values that are not finite are left out (:class:`NonFiniteGuard` reports them).

    Args:
        device: of the training, where the sums are kept.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: dict[str, Tensor], prefix: str = "") -> None:
        """Add scalar tensors, under ``<prefix>_<name>`` if there is a prefix."""
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
        """The means for sums and counts (of this or of all processes); starts a new window."""
        self._sums, self._counts = {}, {}
        rows = sums_and_counts.tolist()  # the only synchronisation with the device
        return {name: total / count for name, (total, count) in zip(names, rows) if count}

    def state_dict(self) -> dict[str, list[float]]:
        """Sum and count by name, for a checkpoint between two log lines; the window continues."""
        names, sums_and_counts = self.tensors()
        return dict(zip(names, sums_and_counts.tolist()))

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        """Continue the window that :meth:`state_dict` describes."""
        self._sums = {n: torch.tensor(total, device=self.device) for n, (total, _) in state.items()}
        self._counts = {n: torch.tensor(count, device=self.device) for n, (_, count) in state.items()}


class Ema:
    """Exponential moving average ``average <- d average + (1 - d) weight``, kept in float32.

    The decay is warmed up as ``d = min(decay, (1 + n) / (10 + n))`` for the n-th update, so that a short
    training is not dominated by its first weights. A skipped step is no update.

    Averages of sharded parameters are sharded alike.

    Args:
        parameters: the trained parameters in float32, in a fixed order.
        decay: final decay in [0, 1).
        device: where the averages are kept; by default beside the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, *, device: str | None = None) -> None:
        self.parameters = list(parameters)
        self.decay = decay
        self.averages = [p.detach().to(device or p.device, torch.float32, copy=True) for p in self.parameters]
        self.updates = torch.zeros((), dtype=torch.int64, device=self.averages[0].device)
        """How many, where the averages are: a device alone knows whether a step was good."""

    @torch.no_grad()
    def update(self, good: Tensor | bool = True) -> None:
        """Move the averages towards the current weights after a ``good`` step, a boolean scalar on the device."""
        good = torch.as_tensor(good, device=self.updates.device)
        self.updates += good
        share = (9 / (10 + self.updates)).clamp(min=1 - self.decay) * good  # 1 - d
        for average, parameter in zip(self.averages, self.parameters):
            average.lerp_(parameter.detach().to(average.device, torch.float32), share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Context in which the parameters and the averages have changed places, one tensor at a time."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the parameter's index, as stored in checkpoints."""
        return {str(i): average for i, average in enumerate(self.averages)}

    def restore(self, saved: dict[str, Tensor], updates: int) -> None:
        """Restore whole averages saved from :meth:`tensors`, and the number of updates that made them."""
        self.updates.fill_(updates)
        self.averages = [like(saved[name], average) for name, average in self.tensors().items()]

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, average in zip(self.parameters, self.averages):
            own = parameter.clone()
            parameter.copy_(average)
            average.copy_(own)
