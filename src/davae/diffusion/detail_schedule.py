"""How the detail channels enter the diffusion loss over time (Eq. 12).

>>> [detail_weight(step, warmup_steps=1000) for step in (0, 500, 1000, 2000)]
[0.0, 0.49999999999999994, 1.0, 1.0]
"""

import math

from davae.choices import ScheduleShape, check_choice
from davae.errors import DavaeError


def detail_weight(
    step: int,
    warmup_steps: int,
    end_weight: float = 1.0,
    *,
    start_step: int = 0,
    start_weight: float = 0.0,
    shape: ScheduleShape = "cosine",
) -> float:
    """``w(n)``, the weight of the detail channels at optimizer step n.

    Eq. 12 is the default: ``w(n) = (1 - cos(pi n / N)) / 2`` for ``n < N``, else 1. In general the weight is
    `start_weight` up to `start_step`, `end_weight` from ``start_step + warmup_steps``, and between them a
    cosine or a straight line; with ``"constant"`` it is `end_weight` throughout.

    Args:
        step: ``n``, at least 0.
        warmup_steps: ``N``; with 0 the weight jumps to `end_weight` at `start_step`.
        end_weight: after the warm-up.
        start_step: step at which the warm-up begins.
        start_weight: before the warm-up.
        shape: ``"cosine"``, ``"linear"`` or ``"constant"``.

    Raises:
        DavaeError: a step or weight that is negative or not finite, or an unknown shape.
    """
    for name, value in (("step", step), ("warmup_steps", warmup_steps), ("start_step", start_step)):
        if not (value >= 0 and math.isfinite(value)):
            raise DavaeError(f"{name} must be finite and not negative, got {value}")
    for name, weight in (("start_weight", start_weight), ("end_weight", end_weight)):
        if not (weight >= 0 and math.isfinite(weight)):
            raise DavaeError(f"{name} must be finite and not negative, got {weight}")
    check_choice(shape, ScheduleShape, "schedule shape")
    if shape == "constant" or step >= start_step + warmup_steps:
        return float(end_weight)
    progress = max(step - start_step, 0) / warmup_steps  # in [0, 1)
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start_weight + (end_weight - start_weight) * progress
