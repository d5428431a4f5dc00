"""Sharded tensors (``DTensor``): gathering for files, gradient norms, clipping and masks.

Everything here takes ordinary tensors as well. Gathering a tensor or summing over shards is a collective operation:
**all ranks must call it**, even if only the first one uses the result.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.batchnorm import _NormBase

from davae.errors import DavaeError


def whole_tensor(tensor: Tensor) -> Tensor:
    """The whole tensor, in every process; all ranks must call this for a sharded one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_state_on_cpu(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """The whole tensors on the CPU if ``keep``, else an empty dictionary; gathers one tensor at a time.

    Tensors that are whole and on the CPU already are not copied. All ranks must call this, with the same names in the
    same order.
    """
    kept = {}
    for name, tensor in tensors.items():
        if keep or isinstance(tensor, DTensor):
            whole = whole_tensor(tensor.detach())
            if keep:
                kept[name] = whole.to("cpu")
    return kept


def like(value: Tensor, model: Tensor) -> Tensor:
    """Give a whole tensor the device, and the sharding or memory format, of ``model``; it keeps its own dtype."""
    value = value.to(model.device)
    if isinstance(model, DTensor):
        return distribute_tensor(value, model.device_mesh, model.placements)
    return torch.empty_like(model, dtype=value.dtype).copy_(value)


@torch.no_grad()
def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of each parameter's whole gradient, float32 ``[parameters]``; 0 for a parameter without one."""
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
    """Convert boolean masks of whole parameters for :func:`mask_gradients`; all ranks must call this.

    Args:
        module: its parameters may be sharded.
        masks: by exact parameter name, of the parameter's shape.
    """
    named = {name: module.get_parameter(name) for name in masks}
    return {name: like(mask.to(named[name].dtype), named[name].detach()) for name, mask in masks.items()}


@torch.no_grad()
def mask_gradients(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Multiply gradients by the 0/1 masks of :func:`spread_masks`, in place."""
    for name, mask in masks.items():
        gradient = module.get_parameter(name).grad
        if gradient is not None:
            gradient.mul_(mask)


def clip_gradients(parameters: list[nn.Parameter], most: float) -> Tensor:
    """Scale gradients down to a total 2-norm of ``most``; returns the norm before, a scalar tensor."""
    return whole_tensor(nn.utils.clip_grad_norm_(parameters, most))


def changing_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module that training changes: running statistics of batch norms and their like.

    Others, such as tables of positions, are constants, which no checkpoint needs and no process sends to another.
    """
    norms = {name: part for name, part in module.named_modules() if isinstance(part, _NormBase)}
    return {
        f"{name}.{own}" if name else own: buffer
        for name, norm in norms.items()
        for own, buffer in norm.named_buffers(recurse=False)
    }


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module that training changes: trained parameters and :func:`changing_buffers`."""
    return {**{n: p for n, p in module.named_parameters() if p.requires_grad}, **changing_buffers(module)}


@torch.no_grad()
def restore_module(module: nn.Module, saved: dict[str, Tensor], where: Path) -> None:
    """Copy the tensors of checkpoint ``where`` into a module; :class:`DavaeError` if names or shapes differ.

    The constant buffers that earlier versions saved too are left as they are.
    """
    current = module_tensors(module)
    constant = module.state_dict().keys() - current.keys() - {name for name, _ in module.named_parameters()}
    differing = sorted((current.keys() ^ saved.keys()) - constant)
    if differing:
        raise DavaeError(
            f"checkpoint {where} does not hold the weights that this run trains: "
            f"{len(differing)} names differ, first '{differing[0]}'"
        )
    for name, tensor in current.items():
        if tensor.shape != saved[name].shape:
            raise DavaeError(
                f"checkpoint {where}: '{name}' has shape {tuple(saved[name].shape)}, expected {tuple(tensor.shape)}"
            )
        tensor.copy_(like(saved[name], tensor))


GROUP_STATE = ("k", "weight_sum", "lr_max", "d", "d_max", "d_hat", "d_numerator", "d_denom")
"""Numbers that optimizers (schedule-free, Prodigy) keep in their parameter groups and change in their steps."""
_OF_GROUP = "group_"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state (moments, step counts) by ``<parameter index>.<name>``.

    A group's numbers stand with its first parameter, as ``<parameter index>.group_<name>`` in float64.
    """
    whole = optimizer.state_dict()
    found = {
        f"{index}.{name}": torch.as_tensor(value)
        for index, entry in whole["state"].items()
        for name, value in entry.items()
    }
    for group in whole["param_groups"]:
        for name in (name for name in GROUP_STATE if name in group):
            found[f"{group['params'][0]}.{_OF_GROUP}{name}"] = torch.tensor(group[name], dtype=torch.float64)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Restore the state that :func:`optimizer_tensors` gave.

    Files hold whole, contiguous tensors. Moments get the sharding and memory format of their parameter, which fused
    optimizers expect: a channels-last weight with contiguous moments would be updated wrongly.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    numbers: dict[int, dict[str, float]] = {}
    for key, value in saved.items():
        index, _, name = key.partition(".")
        if name.startswith(_OF_GROUP):
            number = value.item()
            short = name.removeprefix(_OF_GROUP)
            numbers.setdefault(int(index), {})[short] = int(number) if short == "k" else number
            continue
        parameter = parameters[int(index)]
        if value.shape == parameter.shape:
            value = like(value, parameter)
        state.setdefault(int(index), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    for group in groups:  # with other rates groups differ: then those of any parameter in it, or of another group
        own = [numbers[index] for index in (*group["params"], *numbers) if index in numbers]
        group.update(own[0] if own else {})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
