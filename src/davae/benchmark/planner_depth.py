"""Deep models measured on short ones: equal blocks cost equally, so a few of each tell what all of them cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from davae.benchmark.planner_memory import Cost

_MEASURED = 2  # blocks of each run in the shortest model


@dataclass(frozen=True)
class BlockRun:
    """Consecutive blocks of one list that are built alike. Attributes: the list's name, first index, number."""

    name: str
    first: int
    count: int


def block_runs(model: nn.Module) -> list[BlockRun]:
    """The runs of equal blocks in the model's lists; none where blocks are wired to each other by number.

    Blocks are equal where their parameters have the same names and shapes.
    """
    if any("skip" in name for name, _ in model.named_parameters()):
        return []  # a U-shape pairs its blocks
    runs = []
    for name, blocks in model.named_children():
        if not isinstance(blocks, nn.ModuleList):
            continue
        shapes = [[(n, p.shape) for n, p in block.named_parameters()] for block in blocks]
        first = 0
        for i in range(1, len(shapes) + 1):
            if i == len(shapes) or shapes[i] != shapes[first]:
                runs.append(BlockRun(name, first, i - first))
                first = i
    return runs


def cost_by_depth(measure: Callable[[Callable[[nn.Module], nn.Module]], Cost], runs: list[BlockRun]) -> Cost:
    """The cost of a deep model from those of short ones, each measured by ``measure(shorten)``.

    Operations are exact. So is the memory where every block of a run keeps as much; the peak of checkpointed
    blocks lies within one run, whose interior counts once.

    Args:
        measure: builds the model, applies ``shorten`` to it, and runs it.
        runs: of the deep model.
    """
    shortest = {i: min(run.count, _MEASURED) for i, run in enumerate(runs)}
    base = measure(lambda model: _shorten(model, runs, shortest))
    flops, peak = base.flops, base.peak_bytes
    for i, run in enumerate(runs):
        left = run.count - shortest[i]
        if left:
            longer = {**shortest, i: shortest[i] + 1}
            more = measure(lambda model, longer=longer: _shorten(model, runs, longer))  # type: ignore[misc]
            flops += left * (more.flops - base.flops)
            peak += left * (more.peak_bytes - base.peak_bytes)
    return Cost(flops, peak)


def _shorten(model: nn.Module, runs: list[BlockRun], counts: dict[int, int]) -> nn.Module:
    for name in {run.name for run in runs}:
        blocks = getattr(model, name)
        kept = [
            blocks[run.first + k] for i, run in enumerate(runs) if run.name == name for k in range(counts[i])
        ]
        setattr(model, name, nn.ModuleList(kept))
    return model
