"""Transformer blocks whose frozen weights rest in main memory and are on the device only while they compute.

diffusers' group offloading (``diffusers.hooks.group_offloading``) is for inference: its hook after a block's forward
puts other data into the same parameters, which autograd has saved for the backward, so that the backward finds weights
of another device. Here the parameters stay what they are, in main memory; a block's forward sees copies in their place.
What is kept of a copy is left to autograd:

* With gradient checkpointing nothing of the first forward is kept. The forward that is repeated in the backward saves
  its copies until the block's gradients are computed.
* Otherwise what a forward would save of a copy is noted down and copied again when the backward asks for it.

Copies hold the same numbers, so losses and gradients are those of a model that is on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from davae.pipelines.sampling.speed import regions

_ALIGNMENT = 64


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


class PageLocked:
    """Page-locked main memory for many tensors.

    torch rounds every piece of it up to a power of two bytes: for the weights of FLUX.1-dev, one by one, by 56 %. Here
    they share pieces of a gigabyte.

    Args:
        together: bytes of all tensors.
        lock: lock the pages, which needs a CUDA device.
    """

    def __init__(self, together: int, *, lock: bool = True) -> None:
        self.lock, self.bytes = lock, 0
        self._piece = min(1 << 30, _power_of_two(together))
        self._free = torch.empty(0, dtype=torch.uint8)

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy of a dense tensor, of the same strides."""
        taken = -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if taken > len(self._free):
            size = max(self._piece, _power_of_two(taken))
            self._free = torch.empty(size, dtype=torch.uint8, pin_memory=self.lock)
            self.bytes += size
        own, self._free = self._free[: tensor.nbytes], self._free[taken:]
        return own.view(tensor.dtype).as_strided(tensor.size(), tensor.stride()).copy_(tensor)


class RestingParameter(nn.Parameter):
    """A frozen parameter that stays in main memory when its module is moved to a device."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """As :meth:`torch.Tensor.to`, without a change of device."""
        _, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        return self.data.to(dtype=dtype or self.dtype, memory_format=memory_format or torch.preserve_format)


@dataclass(frozen=True)
class _Saved:
    """What autograd would have saved of a copy: the parameter it is of, and where in it."""

    parameter: RestingParameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


Home = tuple[nn.Module, str, RestingParameter]
"""A module, the name of its parameter, and the parameter while it rests."""


def _homes(module: nn.Module) -> list[Home]:
    """Let the frozen parameters of a module itself rest."""
    homes = [
        (module, name, RestingParameter(parameter.data, requires_grad=False))
        for name, parameter in module.named_parameters(recurse=False)
        if not parameter.requires_grad
    ]
    for _, name, parameter in homes:
        module._parameters[name] = parameter
    return homes


class BlockOffload:
    """Lets the frozen weights of a transformer's blocks rest in main memory until :meth:`remove`.

    The blocks are those of :func:`davae.pipelines.sampling.speed.regions`.

    Args:
        transformer: in main memory; which parameters are frozen must not change until then. Its other tensors are
            moved to the device by the caller.
        device: where blocks compute.
        pin: page-lock the weights before they are first copied to a CUDA device, which makes copies faster.
    """

    def __init__(self, transformer: nn.Module, device: torch.device, *, pin: bool = True) -> None:
        self.device, self.pin = device, pin and device.type == "cuda"
        self._is_locked = False
        self._resting: list[Home] = []
        self._calls: list[dict[int, Home]] = []
        """Of each call in progress what it fetched, by the address of the copy's storage."""
        self._saving = saved_tensors_hooks(self._pack, self._unpack)
        self._handles = [
            transformer.register_forward_pre_hook(lambda *_: self._saving.__enter__()),
            transformer.register_forward_hook(lambda *_: self._saving.__exit__(), always_call=True),
        ]
        for block in regions(transformer):
            of_block = [home for module in block.modules() for home in _homes(module)]
            self._resting += of_block
            self._watch(block, of_block)
            for module in block.modules():  # DiT asks its first block's embedding before the blocks
                if module is not block and (own := [home for home in of_block if home[0] is module]):
                    self._watch(module, own)

    def _watch(self, module: nn.Module, homes: list[Home]) -> None:
        self._handles += [
            module.register_forward_pre_hook(partial(self._fetch, homes)),
            # also when recomputation stops early, which torch does by an exception
            module.register_forward_hook(self._drop, always_call=True),
        ]

    def remove(self) -> None:
        """Make the resting weights ordinary parameters again, in main memory."""
        for handle in self._handles:
            handle.remove()
        for module, name, parameter in self._resting:
            module._parameters[name] = nn.Parameter(parameter.data, requires_grad=False)

    def copy(self, parameter: RestingParameter) -> Tensor:
        """A copy on the device, of the same strides."""
        if self.pin and not self._is_locked:
            self._lock()
        return parameter.data.to(self.device, non_blocking=self.pin, copy=True)

    def _lock(self) -> None:
        memory = PageLocked(sum(parameter.nbytes for _, _, parameter in self._resting))
        for _, _, parameter in self._resting:
            parameter.data = memory.moved(parameter.data)
        self._is_locked = True

    def _fetch(self, homes: list[Home], *_: object) -> None:
        """Put copies in place of the parameters that rest, and not of those that an outer call has fetched."""
        fetched: dict[int, Home] = {}
        for module, name, parameter in homes:
            if module._parameters[name] is parameter:
                copy = self.copy(parameter)
                fetched[copy.untyped_storage().data_ptr()] = (module, name, parameter)
                module._parameters[name] = nn.Parameter(copy, requires_grad=False)
        self._calls.append(fetched)

    def _drop(self, *_: object) -> None:
        for module, name, parameter in self._calls.pop().values():
            module._parameters[name] = parameter

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        address = tensor.untyped_storage().data_ptr()
        for fetched in self._calls:
            if address in fetched and fetched[address][2].dtype == tensor.dtype:
                return _Saved(fetched[address][2], tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return tensor

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        return self.copy(saved.parameter).as_strided(saved.size, saved.stride, saved.offset)
