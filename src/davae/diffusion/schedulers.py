"""One interface to diffusers' flow-matching schedulers: Euler, Heun, LCM, DPM-Solver++, UniPC.

Euler steps ``x <- x + (sigma' - sigma) velocity`` lead from noise to data; with the true velocity they arrive exactly:

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
    """Reject a scheduler that is not for flow matching.

    Raises:
        DavaeError: names the settings that configure one of diffusers' solvers for flow matching.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if name.startswith("FlowMatch"):
        if config.get("use_dynamic_shifting"):
            raise DavaeError(
                f"{name} shifts by the number of tokens (use_dynamic_shifting), but these models were trained "
                "without it: set use_dynamic_shifting=False and a fixed shift"
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
    """A scheduler of the same class with another shift of ``sigma``; the given one is left unchanged.

    Raises:
        DavaeError: a shift that is not finite and above 0.
    """
    check_shift(shift)
    name = "shift" if "shift" in scheduler.config else "flow_shift"
    return type(scheduler).from_config(scheduler.config, **{name: shift})


def set_sigmas(scheduler: SchedulerMixin, steps: int, device: torch.device) -> list[float]:
    """Prepare a scheduler for sampling in ``steps`` steps.

    Euler and LCM get a uniform grid of ``steps`` intervals from ``sigma = 1`` to 0, then the scheduler's shift: the
    official samplers' grid, which they specify by its ``steps + 1`` points. Others use their own: Heun calls the model
    twice a step except in the last, DPM-Solver++ and UniPC begin just below 1, where their log-SNR is still finite.

    Returns:
        ``sigma`` at each call of the model, one for each of ``scheduler.timesteps``.

    Raises:
        DavaeError: fewer than one step.
    """
    if steps < 1:
        raise DavaeError(f"sampling needs at least one step, not {steps}")
    if type(scheduler).__name__ in _OWN_GRID:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device)
    else:
        scheduler.set_timesteps(steps, device=device)
    scheduler.set_begin_index(0)
    # One transfer before the loop; Python floats, because not every device has float64.
    sigmas: list[float] = scheduler.sigmas.tolist()
    return sigmas[: len(scheduler.timesteps)]


def scheduler_step(
    scheduler: SchedulerMixin,
    prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    generator: torch.Generator | list[torch.Generator] | None,
) -> Tensor:
    """One step from the latents at ``timestep`` to the next ones, the same shape.

    Args:
        scheduler: after :func:`set_sigmas`.
        prediction: ``noise - data``, float32.
        timestep: an entry of ``scheduler.timesteps``.
        latents: float32, the same shape.
        generator: for schedulers that draw noise, or None.
    """
    drawn: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        drawn["generator"] = generator
    (latents,) = scheduler.step(prediction, timestep, latents, **drawn, return_dict=False)
    return latents
