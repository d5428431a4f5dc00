"""AdamW with a learning rate for each parameter, and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from davae.errors import DavaeError
from davae.recipes.loop import OptimizerSettings
from davae.training.eight_bit import eight_bit_adamw


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or a cosine down to ``lr_end``."""
    peak, warmup = settings.learning_rate, settings.lr_warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.lr_scheduler == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.lr_end + (peak - settings.lr_end) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(
    name: str, module: nn.Module, settings: OptimizerSettings, rates: dict[str, float]
) -> torch.optim.Optimizer:
    """AdamW over a module's trained parameters: torch's fused one, or the one of 8 bits.

    Args:
        name: whose optimizer it is, for the error.
        module: its parameters that require gradients are trained.
        settings: of AdamW.
        rates: learning rates of parameters by exact name, where they differ from the settings'; kept as
            ``rate_factor`` of the parameter group, which multiplies the scheduled rate.

    Raises:
        DavaeError: no parameter requires gradients, or bitsandbytes is needed and not installed.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise DavaeError(f"{name}: no parameter is trained; check what the recipe tunes")
    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter_name, parameter in named:
        by_rate.setdefault(rates.get(parameter_name, settings.learning_rate), []).append(parameter)
    groups = [{"params": p, "rate_factor": rate / settings.learning_rate} for rate, p in by_rate.items()]
    if settings.kind == "adamw8bit":
        return eight_bit_adamw(groups, settings)
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )
