"""diffusers' flow-matching schedulers, all walked in the same way: Euler, Heun, LCM, DPM-Solver++, UniPC.

A walk from noise to data by Euler steps, ``x <- x + (sigma' - sigma) velocity``; the true velocity leads to the data:

    >>> from diffusers import FlowMatchEulerDiscreteScheduler
    >>> scheduler, data, noise = FlowMatchEulerDiscreteScheduler(), torch.ones(1, 1), torch.zeros(1, 1)
    >>> set_sigmas(scheduler, 4, torch.device("cpu"))
    [1.0, 0.75, 0.5, 0.25]
    >>> latents = noise
    >>> for timestep in scheduler.timesteps:
    ...     latents = scheduler_step(scheduler, noise - data, timestep, latents, None)
    >>> latents
    tensor([[1.]])
"""

import inspect
from typing import Any

import numpy as np
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from davae.diffusion.timesteps import check_shift
from davae.errors import DavaeError

_OWN_GRID = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")


def check_flow_scheduler(scheduler: SchedulerMixin) -> None:
    """Refuse a scheduler that does not walk the straight path between noise and data.

    Raises:
        DavaeError: names the settings that make a solver of diffusers one for flow matching.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith("FlowMatch"):
        if config.get("use_dynamic_shifting"):
            raise DavaeError(
                f"{name} shifts by the number of tokens (use_dynamic_shifting), which these models were not "
                "trained with: set use_dynamic_shifting=False and a fixed shift"
            )
        return
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        return
    raise DavaeError(
        f"{name} is not set up for flow matching: take FlowMatchEulerDiscreteScheduler or "
        "FlowMatchHeunDiscreteScheduler, or a solver such as UniPCMultistepScheduler with use_flow_sigmas=True "
        'and prediction_type="flow_prediction"'
    )


def shifted_scheduler(scheduler: SchedulerMixin, shift: float) -> SchedulerMixin:
    """A scheduler of the same kind with another shift, counted in ``sigma``; the given one stays as it is.

    Raises:
        DavaeError: a shift that is not finite and above 0.
    """
    check_shift(shift)
    name = "shift" if "shift" in scheduler.config else "flow_shift"
    return type(scheduler).from_config(scheduler.config, **{name: shift})


def set_sigmas(scheduler: SchedulerMixin, steps: int, device: torch.device) -> list[float]:
    """Prepare a scheduler for a walk of ``steps`` steps.

    Euler and LCM get a uniform grid of ``steps`` intervals from ``sigma = 1`` to 0, then the scheduler's shift: the
    official samplers' grid, whose count is of points, one more. Others lay their own: Heun's asks the model twice a
    step except in the last, DPM-Solver++ and UniPC begin just below ``sigma = 1``, where their logarithms end.

    Returns:
        ``sigma`` at each call of the model, one for each of ``scheduler.timesteps``.

    Raises:
        DavaeError: fewer than one step.
    """
    if steps < 1:
        raise DavaeError(f"a walk needs at least one step, not {steps}")
    if type(scheduler).__name__ in _OWN_GRID:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    # One transfer, before the loop; as Python's float64, which not every device has.
    sigmas: list[float] = scheduler.sigmas.tolist()
    return sigmas[: len(scheduler.timesteps)]


def scheduler_step(
    scheduler: SchedulerMixin,
    prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """One step; the generator is for schedulers that draw noise.

    Args:
        scheduler: after :func:`set_sigmas`.
        prediction: ``noise - data``, float32.
        timestep: of ``scheduler.timesteps``.
        latents: float32, the same shape.
        generator: or None.
    """
    drawn: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        drawn["generator"] = generator
    (latents,) = scheduler.step(prediction, timestep, latents, **drawn, return_dict=False)
    return latents
