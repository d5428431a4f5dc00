"""Exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from davae.training.sharded_tensors import like


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
