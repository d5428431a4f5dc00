"""How strongly an upgraded pipeline's scheduler leans towards noise: a decision, written into its configuration.

Flow-matching schedulers move their noise levels by a shift ``a``: ``sigma <- a sigma / (1 + (a - 1) sigma)``. Larger
images were trained with a larger one, and many pipelines derive it from the number of image tokens ``n``: ``mu(n)`` on
a line through two points of the configuration, ``a = exp(mu)``. An upgraded pipeline makes an image ``s`` times
larger per side from the base's tokens, and so has to choose between the shift of its tokens and that of its pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from davae.errors import DavaeError
from davae.pipelines.families import find_family
from davae.pipelines.families.family import SHIFT_LINE

logger = logging.getLogger(__name__)

TimestepShift = Literal["base", "native"] | float


def scheduler_for(
    pipe: DiffusionPipeline, shift: TimestepShift, *, scale: int, channels: tuple[int, int]
) -> SchedulerMixin:
    """A copy of the pipeline's scheduler with the shift that its upgraded pipeline is to have.

    Args:
        pipe: the base pipeline; its scheduler is not changed.
        shift: ``"base"``: at a number of tokens the schedule that the base was trained with at this number.
            ``"native"``: the one that the base would have used for the full resolution, ``s^2`` times the tokens
            (the token counts in the configuration are divided by ``s^2``). A number: that shift ``a``, for every size.
        scale: ``s``.
        channels: of the base latent and of the upgraded one.

    Raises:
        DavaeError: the choice is unknown, or this pipeline does not read it from its scheduler.
    """
    config = pipe.scheduler.config
    changes: dict[str, Any] = {}
    if isinstance(shift, bool) or not (shift in ("base", "native") or isinstance(shift, int | float)):
        raise DavaeError(f"timestep_shift must be 'base', 'native' or a number, not {shift!r}")
    if isinstance(shift, int | float):
        changes = _fixed(pipe, float(shift))
    elif config.get("use_dynamic_shifting"):
        changes = _line(pipe, shift, scale, channels)
    scheduler = type(pipe.scheduler).from_config(config, **changes)
    logger.info("timestep shift '%s': %s", shift, _summary(scheduler, shift))
    return scheduler


def _line(
    pipe: DiffusionPipeline, shift: str | float, scale: int, channels: tuple[int, int]
) -> dict[str, Any]:
    family = find_family(pipe)
    if family.shift_rule is not None:
        if shift == "base" and not family.shift_reads_pixels:
            return {}
        raise DavaeError(
            f"timestep_shift '{shift}' cannot be written into the scheduler: {type(pipe).__name__} "
            f"{family.shift_rule}. Give a number"
        )
    line = {key: pipe.scheduler.config.get(key, value) for key, value in SHIFT_LINE.items()}
    factor = family.shift_line_factor(native=shift == "native", scale=scale, channels=channels)
    for key in ("base_image_seq_len", "max_image_seq_len"):
        stretched = line[key] * factor
        line[key] = int(stretched) if stretched == int(stretched) else stretched
    return line


def _fixed(pipe: DiffusionPipeline, shift: float) -> dict[str, Any]:
    if not (math.isfinite(shift) and shift > 0):
        raise DavaeError(f"a timestep shift must be a positive number, not {shift}")
    config = pipe.scheduler.config
    key = next((key for key in ("flow_shift", "shift") if key in config), None)
    flow = (
        key == "shift" or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    )
    if key is None or not flow:
        raise DavaeError(
            f"{type(pipe.scheduler).__name__} has no timestep shift (it is not a flow-matching scheduler here): "
            "leave timestep_shift at 'base'"
        )
    changes: dict[str, Any] = {key: shift}
    if config.get("use_dynamic_shifting"):  # what the pipeline computes is not asked for then
        changes["use_dynamic_shifting"] = False
    return changes


def _shift_key(config: Mapping[str, Any]) -> str | None:
    """Where a scheduler's configuration holds a fixed shift; none where it is no flow-matching scheduler."""
    if "shift" in config:
        return "shift"
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return "flow_shift" if "flow_shift" in config and flow else None


def _summary(scheduler: SchedulerMixin, shift: TimestepShift) -> str:
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        written = ", ".join(f"{key} {config[key]}" for key in SHIFT_LINE if key in config)
        return f"follows the number of tokens: {written}"
    key = _shift_key(config)
    if key is None:
        return "this scheduler has none"
    why = " (the same for every size, so nothing changes)" if isinstance(shift, str) else ""
    return f"{key} {config[key]}{why}"
