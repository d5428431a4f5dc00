"""What bounds a training step: where its time goes, and in which operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from davae.benchmark.timing import synchronise

_BACKWARD = "autograd::engine::evaluate_function"
_OPTIMIZER = "Optimizer.step#"
_DATA = "enumerate(DataLoader)#"


@dataclass(frozen=True)
class OperatorTime:
    """One operator. Attributes: name; its own seconds; their share of all operators' own; how often it ran."""

    name: str
    seconds: float
    share: float
    calls: int


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes.

    Attributes:
        parts: shares of ``forward``, ``backward``, ``optimizer`` and ``data``, 1 together. The optimizer's is AdamW's
            alone; clipping, the average of weights and the check of gradients count as forward.
        operators: the ten most expensive ones, the first one first.
    """

    parts: dict[str, float]
    operators: list[OperatorTime]


def profile_step(step: Callable[[], None]) -> StepProfile:
    """Profile one call, after one that is not counted.

    On a GPU the times are the device's, but for the loading of data.

    Args:
        step: a training step, as `davae.training.loop.steps_of` gives it.
    """
    step()
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronise()
    with profile(activities=activities) as recorded:
        step()
        synchronise()
    averages = list(recorded.key_averages())

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6

    def whole(event: Any) -> float:
        return float(event.device_time_total if cuda else event.cpu_time_total) / 1e6

    def under(name: str, measure: Callable[[Any], float]) -> float:
        return sum(measure(event) for event in averages if event.key.startswith(name))

    data = sum(float(e.cpu_time_total) for e in averages if e.key.startswith(_DATA)) / 1e6
    total = sum(map(own, averages))
    spent = {"backward": under(_BACKWARD, whole), "optimizer": under(_OPTIMIZER, whole), "data": data}
    rest = max(0.0, total - spent["backward"] - spent["optimizer"] - (0.0 if cuda else data))
    parts = {"forward": rest, **spent}
    return StepProfile(_shares(parts), _most_expensive(averages, own, total))


def _shares(parts: dict[str, float]) -> dict[str, float]:
    together = sum(parts.values()) or 1.0
    return {name: seconds / together for name, seconds in parts.items()}


def _most_expensive(averages: Iterable[Any], own: Callable[[Any], float], total: float) -> list[OperatorTime]:
    named = [event for event in averages if event.key.startswith(("aten::", "fused", "triton"))]
    named.sort(key=own, reverse=True)
    return [OperatorTime(e.key, own(e), own(e) / (total or 1.0), int(e.count)) for e in named[:10]]
