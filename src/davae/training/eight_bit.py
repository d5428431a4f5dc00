"""AdamW with moments of 8 bits (bitsandbytes): 2 bytes for each trained weight in place of 8.

An optional part: ``pip install bitsandbytes``. Moments of tensors below 4,096 elements stay in float32, as
bitsandbytes does by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from davae.errors import DavaeError
from davae.recipes.loop import OptimizerSettings

_WRAPPED = "__bnb_optimizer_quant_state__"


def eight_bit_adamw(groups: list[dict[str, Any]], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer over parameter groups; it keeps its promises to the loop and to checkpoints.

    Like torch's fused one it leaves out a step whose ``found_inf`` is set; its state is flat and plain tensors, so that
    a checkpoint holds all of it and a resumed run goes on bit by bit.

    Raises:
        DavaeError: bitsandbytes is not installed.
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
                    "optimizer.kind=adamw8bit cannot update weights that are spread over processes (FSDP): "
                    "set optimizer.kind=adamw, whose moments are spread with them"
                )
            if self.found_inf is not None and bool(self.found_inf):  # waits for the device
                return None
            return super().step(closure)

        def state_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().state_dict()
            found["state"] = {key: _flat(entry) for key, entry in found["state"].items()}
            return found

        def load_state_dict(self, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            entries = {
                key: {**entry, "step": int(entry["step"])} for key, entry in state_dict["state"].items()
            }
            super().load_state_dict({**state_dict, "state": entries}, move_to_device)

    for group in groups:  # blocks of moments follow memory, not channels: one order for new and resumed runs
        for parameter in group["params"]:
            parameter.data = parameter.data.contiguous()
    return GuardedAdamW8bit(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )


def _flat(entry: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state with what bitsandbytes wraps for FSDP taken out again."""
    return {name: value for name, value in entry.items() if name != _WRAPPED} | entry.get(_WRAPPED, {})
