"""The tensors of modules and optimizers that a checkpoint holds, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.training.sharded_tensors import like


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that training changes: trained parameters and buffers."""
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    frozen = {n for n, p in module.named_parameters() if not p.requires_grad}
    buffers = {n: b for n, b in module.state_dict().items() if n not in trained and n not in frozen}
    return {**trained, **buffers}


@torch.no_grad()
def restore_module(module: nn.Module, saved: dict[str, Tensor], where: Path) -> None:
    """Copy saved tensors into a module; both must hold exactly the same names and shapes."""
    current = module_tensors(module)
    if current.keys() != saved.keys():
        differing = sorted(current.keys() ^ saved.keys())
        raise DavaeError(
            f"checkpoint {where} holds other weights than this run trains: "
            f"{len(differing)} names differ, first '{differing[0]}'"
        )
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise DavaeError(
                f"checkpoint {where}: '{name}' has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(like(saved[name], tensor))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's moments as ``<parameter index>.<name>``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in state.items()
        for name, value in entry.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Put moments written by :func:`optimizer_tensors` back.

    Files hold whole, contiguous tensors. Moments are spread and ordered as their parameter is, which fused optimizers
    expect: a channels-last weight with contiguous moments would be updated wrongly.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in saved.items():
        index, _, name = key.partition(".")
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = like(value, parameter)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
