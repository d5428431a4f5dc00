"""A few values of every weight: enough to know a model again, in whatever precision it was loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 8  # of every parameter, evenly spread
_ROUNDING = 1 / 128  # relative: two roundings to bfloat16


@dataclass(frozen=True)
class Samples:
    """Values of a model's parameters in the order of their names.

    Attributes:
        values: float32 ``[n]``, up to ``SAMPLES`` for each floating-point parameter.
    """

    values: Tensor

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Samples:
        """Take the values. Parameters that are not floating-point (quantised ones) are left out."""
        return cls(torch.cat([torch.zeros(0), *(values for _, values in _taken(parameters))]))

    def first_difference(self, parameters: Mapping[str, Tensor]) -> str | None:
        """What tells a model from the one the values are of, in words; None where they agree.

        The same weights in another precision agree: where one side holds rounded numbers, the other is rounded too.
        """
        start = 0
        for name, found in _taken(parameters):
            wanted = self.values[start : start + len(found)]
            start += len(found)
            if len(wanted) < len(found):
                return f"it has more weights, such as '{name}'"
            if not _same(found, wanted):
                return f"'{name}' has other values"
        return None if start == len(self.values) else "it has fewer weights"


def _taken(parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    taken = []
    for name in sorted(parameters):
        flat = parameters[name].detach().flatten()
        if flat.is_floating_point() and len(flat):
            positions = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64)
            taken.append((name, flat[positions.round().long().to(flat.device)].float().cpu()))
    return taken


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same numbers, up to the precision that one of them was stored in."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if (_fits(a, dtype) or _fits(b, dtype)) and torch.equal(a.to(dtype), b.to(dtype)):
            return True
    halves = (torch.bfloat16, torch.float16)
    mixed = any(_fits(a, x) and _fits(b, y) for x, y in (halves, halves[::-1]))
    return mixed and torch.allclose(a, b, rtol=_ROUNDING, atol=1e-6)


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.equal(values.to(dtype).float(), values)
