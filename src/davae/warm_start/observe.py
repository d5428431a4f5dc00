"""Run a model once and record the inputs and outputs of chosen layers, leaving the model unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import WarmStartError
from davae.runtime.devices import without_tf32


@dataclass
class Trace:
    """One forward: the sample, and the inputs and outputs of the watched layers, call by call."""

    sample: Tensor
    entered: dict[str, list[Tensor]] = field(default_factory=dict)
    left: dict[str, list[Tensor]] = field(default_factory=dict)

    @staticmethod
    def joined(traces: Sequence[Trace]) -> Trace:
        """Several forwards as one: samples concatenated along the batch, calls in sequence."""
        joined = Trace(torch.cat([trace.sample for trace in traces]))
        for trace in traces:
            for into, calls in ((joined.entered, trace.entered), (joined.left, trace.left)):
                for name, tensors in calls.items():
                    into.setdefault(name, []).extend(tensors)
        return joined


def run_watched(
    model: nn.Module,
    arguments: Mapping[str, Any],
    *,
    weights: Mapping[str, Tensor],
    layers: Sequence[str],
    jittered: Sequence[str] = (),
) -> Trace:
    """One forward that records `layers`.

    Args:
        model: the module to run.
        arguments: keyword arguments of its forward.
        weights: parameters replaced for this call only, by name.
        layers: modules to watch, by name.
        jittered: modules whose output is changed by one relative epsilon of its dtype, up or down at random.
    """
    trace = Trace(torch.empty(0))

    def recorder(name: str) -> Any:
        def record(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
            if name in jittered:
                output = _jitter(output)
            trace.entered.setdefault(name, []).append(first_tensor((*args, *kwargs.values())))
            trace.left.setdefault(name, []).append(first_tensor(output))
            return output

        return record

    with contextlib.ExitStack() as hooks:
        for name in layers:
            handle = model.get_submodule(name).register_forward_hook(recorder(name), with_kwargs=True)
            hooks.callback(handle.remove)
        trace.sample = first_tensor(torch.func.functional_call(model, dict(weights), (), dict(arguments)))
    return trace


def _jitter(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    sign = 2 * torch.randint(2, output.shape, generator=generator) - 1
    return output * (1 + torch.finfo(output.dtype).eps * sign.to(output))


def first_tensor(value: Any) -> Tensor:
    """The tensor itself, an output object's ``sample``, the first of a tuple, or a list's tensors stacked."""
    while not isinstance(value, Tensor):
        if hasattr(value, "sample"):
            value = value.sample
        elif isinstance(value, list) and all(isinstance(v, Tensor) for v in value):
            value = torch.stack(value)  # one sample each
        else:
            value = next(v for v in value if v is not None)
    return value


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, autocast or TF32; every module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with (
            torch.no_grad(),
            torch.autocast(next(model.parameters()).device.type, enabled=False),
            without_tf32(),
        ):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def relative_difference(a: Tensor, b: Tensor) -> float:
    """``max|a - b| / max|b|``; infinite if the shapes differ, or if b is all zero and a is not."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.cpu().double(), b.cpu().double()  # not every device has float64
    difference, largest = float((a - b).abs().max()), float(b.abs().max())
    if difference == 0:
        return 0.0
    return difference / largest if largest > 0 else float("inf")


def largest_difference(after: Mapping[str, list[Tensor]], before: Mapping[str, list[Tensor]], name: str) -> float:
    """The largest relative difference of a layer over its calls.

    Raises:
        WarmStartError: the layer did not run, or not equally often in both models.
    """
    counts = len(before.get(name, [])), len(after.get(name, []))
    if counts[0] != counts[1] or counts[0] == 0:
        raise WarmStartError(
            f"layer {name} ran {counts[0]} times in the original and {counts[1]} times in the widened model: "
            "the description names a layer that the forward does not use as described"
        )
    return max(relative_difference(a, b) for a, b in zip(after[name], before[name], strict=True))
