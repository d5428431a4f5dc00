"""AdamW, fused or with 8-bit moments, with per-parameter learning rates, and the learning rate schedule."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from davae.errors import DavaeError
from davae.recipes.loop import OptimizerSettings


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of ``step`` in [0, ``steps``): linear warm-up, then constant or cosine decay to ``lr_end``."""
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
    """AdamW over a module's trained parameters: torch's fused implementation, or bitsandbytes' with 8-bit moments.

    Args:
        name: of the module, for the error.
        module: its parameters that require gradients are trained.
        settings: of AdamW.
        rates: learning rates by exact parameter name, where they differ from the settings'; stored relative to it as
            the parameter group's ``rate_factor``, which multiplies the scheduled rate. Such a group is named
            ``widened``; other groups have an empty name.

    Raises:
        DavaeError: no parameter requires gradients, or bitsandbytes is needed and not installed.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise DavaeError(f"{name}: no parameter is trained; check what the recipe tunes")
    alike: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter_name, parameter in named:
        decays = parameter.ndim > 1 or not settings.decay_only_matrices
        rate = rates.get(parameter_name, settings.learning_rate)
        alike.setdefault((rate, settings.weight_decay if decays else 0.0), []).append(parameter)
    groups = [
        {
            "params": parameters,
            "weight_decay": decay,
            "rate_factor": rate / settings.learning_rate,
            "name": "" if rate == settings.learning_rate else "widened",
        }
        for (rate, decay), parameters in alike.items()
    ]
    if settings.kind == "adamw8bit":
        return eight_bit_adamw(groups, settings)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


_WRAPPED = "__bnb_optimizer_quant_state__"


def eight_bit_adamw(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with 8-bit moments, adapted to the loop and to checkpoints.

    Like torch's fused AdamW it skips a step if ``found_inf`` is set. Its state is a flat dictionary of plain tensors,
    so that a checkpoint holds all of it and a resumed run is bit-identical.

    Raises:
        DavaeError: bitsandbytes is not installed; from ``step``, weights are sharded.
    """
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise DavaeError(
            f"optimizer.kind=adamw8bit needs bitsandbytes, which cannot be imported ({error}): "
            "`pip install bitsandbytes`, or set optimizer.kind=adamw"
        ) from error

    class GuardedAdamW8bit(AdamW8bit):
        found_inf: torch.Tensor | None = None

        def step(self, closure: Any = None) -> Any:
            if any(isinstance(p, DTensor) for group in self.param_groups for p in group["params"]):
                raise DavaeError(
                    "optimizer.kind=adamw8bit cannot update weights that are sharded over processes (FSDP): "
                    "set optimizer.kind=adamw, whose moments are sharded too"
                )
            if self.found_inf is not None and bool(self.found_inf):  # synchronises with the device
                return None
            return super().step(closure)

        def state_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().state_dict()
            found["state"] = {key: _flat(entry) for key, entry in found["state"].items()}
            return found

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            entries = {key: {**entry, "step": int(entry["step"])} for key, entry in state_dict["state"].items()}
            super().load_state_dict({**state_dict, "state": entries}, move_to_device)

    for group in groups:  # quantisation blocks follow memory order: make it the same in new and resumed runs
        for parameter in group["params"]:
            parameter.data = parameter.data.contiguous()
    return GuardedAdamW8bit(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps)


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state without the nesting that bitsandbytes adds for FSDP."""
    return {name: value for name, value in entry.items() if name != _WRAPPED} | entry.get(_WRAPPED, {})
