"""Sharded models as ordinary ones: for a while (validation), and for good (export)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

ORIGINAL = 2
"""Where a sharded module's own class stands among its classes: ``[FSDPBlock, FSDPModule, Block, ...]``."""


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Within the context a sharded module is an ordinary one with all its weights, in every process.

    Methods besides ``forward`` then work, and nobody waits for anybody. The weights must not be moved or cast
    meanwhile. Does nothing to a module that is not sharded.
    """
    units = units_of(module)
    if units:  # usually done by the first step; a run that is already at its end has none
        module._get_fsdp_state()._lazy_init()  # type: ignore[operator]
    before = [_reshards(unit) for unit in units]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit, reshards in zip(units, before):
            unit.reshard()
            unit.set_reshard_after_forward(reshards, recurse=False)


def dissolve(module: nn.Module) -> None:
    """Make a sharded module an ordinary one for good, with all its weights in every process.

    For what comes after training: export moves, casts and merges weights, which a sharded module does not allow.
    Every process must come along. Does nothing to a module that is not sharded.
    """
    units = units_of(module)
    for unit in units:
        unit.reshard()
    found: dict[int, nn.Parameter] = {}
    for part in module.modules() if units else ():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                own = found.get(id(parameter))
                if own is None:
                    own = nn.Parameter(parameter.full_tensor().clone(), parameter.requires_grad)
                    found[id(parameter)] = own
                part.register_parameter(name, own)
    for unit in units:
        _leave_fsdp(unit)


def units_of(module: nn.Module) -> list[Any]:
    """The parts of a module that are sharded by themselves, itself among them; none where it is not sharded."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _reshards(unit: Any) -> bool:
    """Whether a unit frees its whole weights after ``forward``."""
    return any(group._reshard_after_forward for group in unit._get_fsdp_state()._fsdp_param_groups)


def _leave_fsdp(unit: Any) -> None:
    """Undo what ``fully_shard`` did to a module besides its parameters; torch has no function for it."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    _module_state_mapping.pop(unit, None)
    for key in (STATE_KEY, REGISTRY_KEY):
        unit.__dict__.pop(key, None)
    unit.__class__ = type(unit).__mro__[ORIGINAL]
