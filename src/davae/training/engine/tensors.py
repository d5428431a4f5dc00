"""Tensors spread over processes (``DTensor``): whole ones for files, norms, clipping and masks of gradients.

Everything here takes ordinary tensors as well. What makes a tensor whole or sums over shards is a collective
operation: **all ranks must call it**, also where only the first one writes.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from davae.errors import DavaeError


def whole_tensor(tensor: Tensor) -> Tensor:
    """A tensor with all its elements, in every process; all ranks must call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_on_cpu(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Copies of whole tensors on the CPU where ``keep``, nothing elsewhere; no device holds the whole model at once.

    All ranks must call this, with the same names in the same order.
    """
    kept = {}
    for name, tensor in tensors.items():
        if keep or isinstance(tensor, DTensor):
            whole = whole_tensor(tensor.detach())
            if keep:
                kept[name] = whole.to("cpu", copy=True)
    return kept


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor spread, or ordered in memory, as ``model`` is; in its own dtype, on the model's device."""
    value = value.to(model.device)
    if isinstance(model, DTensor):
        return distribute_tensor(value, model.device_mesh, model.placements)
    return torch.empty_like(model, dtype=value.dtype).copy_(value)


@torch.no_grad()
def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of each parameter's whole gradient, float32 ``[parameters]``; 0 where there is none."""
    gradients = [p.grad if p.grad is not None else p.new_zeros(()) for p in parameters]
    sharded = any(isinstance(g, DTensor) for g in gradients)
    own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    norms = torch.stack([n.float() for n in torch._foreach_norm(own)])
    if not sharded:
        return norms
    squares = norms.double().square()  # of this process's shards
    dist.all_reduce(squares)
    return squares.sqrt().float()


def spread_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Boolean masks of whole parameters as :func:`mask_gradients` takes them; all ranks must call this.

    Args:
        module: whose parameters, sharded or not.
        masks: by a parameter's exact name.
    """
    named = {name: module.get_parameter(name) for name in masks}
    return {name: like(mask.to(named[name].dtype), named[name].detach()) for name, mask in masks.items()}


@torch.no_grad()
def mask_gradients(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set gradients to zero where a mask of :func:`spread_masks` is zero."""
    for name, mask in masks.items():
        gradient = module.get_parameter(name).grad
        if gradient is not None:
            gradient.mul_(mask)


def clip_gradients(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to the 2-norm ``most``; returns the norm before."""
    return whole_tensor(nn.utils.clip_grad_norm_(parameters, most))


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
        f"{index}.{name}": torch.as_tensor(value) for index, entry in state.items() for name, value in entry.items()
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
