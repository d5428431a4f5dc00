"""FSDP2: weights, gradients and optimizer moments sharded over the processes (ZeRO-3; ZeRO-2 on request).

accelerate does the sharding, as its configuration says. This module adds what a training needs around it: which blocks
are sharded separately, and whole models for validation and export. Sharded tensors are ``DTensor``; gathering one is a
collective operation, so **all ranks must call it**, even if only the first one uses the result.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from davae.errors import DavaeError
from davae.runtime.processes import LAUNCHER, refuse_deepspeed
from davae.training.engine.offload import RestingParameter
from davae.training.engine.tensors import changing_buffers

logger = logging.getLogger(__name__)


def begin_accelerator(**options: Any) -> Accelerator:
    """Create the accelerator of one training; it shards with FSDP2 if the launcher's configuration asks for it.

    One process may train several stages in sequence, each with its own precision.

    Args:
        options: of :class:`accelerate.Accelerator`.

    Raises:
        DavaeError: the configuration asks for an unsupported form of FSDP, for FSDP in float16, or for DeepSpeed.
    """
    refuse_deepspeed()
    _forget_the_training_before()
    plugin = _plugin()
    if plugin is not None and options.get("mixed_precision") == "fp16":
        raise DavaeError(
            f"loop.precision=fp16 does not work with FSDP, which {LAUNCHER} asks for: every process would choose "
            "a loss scale of its own. Set loop.precision=bf16"
        )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if plugin is not None and accelerator.use_distributed:
        # Weights stay in float32 and autocast decides what is computed in half precision, as without sharding;
        # FSDP's own policy would also cast latents, times and normalisation layers.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        _engage(plugin)
    return accelerator


def _forget_the_training_before() -> None:
    """Reset accelerate's shared state, which would neither take another precision nor find FSDP a second time."""
    AcceleratorState._reset_state()
    state = PartialState._shared_state
    if state.get("distributed_type") == DistributedType.FSDP:
        kind = state["device"].type
        state["distributed_type"] = DistributedType[f"MULTI_{'GPU' if kind == 'cuda' else kind.upper()}"]


def _engage(plugin: FullyShardedDataParallelPlugin) -> None:
    """Turn FSDP on also on the CPU, where torch supports it (and tests run) but accelerate does not."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def asks_for_fsdp() -> bool:
    """Whether the launcher's configuration asks for FSDP; ``accelerate launch`` passes it in the environment."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def _plugin() -> FullyShardedDataParallelPlugin | None:
    """The launcher's FSDP settings; ``None`` without FSDP."""
    if not asks_for_fsdp():
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise DavaeError(f"{LAUNCHER} asks for FSDP version 1: set fsdp_version: 2")
    plugin = FullyShardedDataParallelPlugin()
    unsupported = {
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing_offload": plugin.activation_checkpointing_offload,
        "fsdp_ignored_modules": plugin.ignored_modules,
        "fsdp_offload_params": os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
    }
    for key, value in unsupported.items():
        if value:
            raise DavaeError(f"{LAUNCHER} sets {key}, which is not supported: remove it")
    return plugin


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether this training shards its model."""
    return accelerator.distributed_type == DistributedType.FSDP


def shard(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """Shard a module in place and point its optimizer at the shards; returns both, prepared.

    Each repeated block (see :func:`block_classes`) is gathered separately when it is computed, the rest once per step.
    With ``fsdp_activation_checkpointing`` the models' own gradient checkpointing is enabled, which does not rename
    weights.

    Args:
        accelerator: of :func:`begin_accelerator`.
        module: its ``forward`` computes the whole loss; weights may be on the CPU.
        optimizer: over its trained parameters.

    Raises:
        DavaeError: activation checkpointing is requested, and no model in the module supports it.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.activation_checkpointing:
        _checkpoint_activations(module)
        plugin.activation_checkpointing = False  # accelerate's way would rename the weights
    names = plugin.transformer_cls_names_to_wrap
    plugin.transformer_cls_names_to_wrap = names or block_classes(module)
    make_contiguous(module)
    module, optimizer = accelerator.prepare(module, optimizer)
    blocks = Counter(type(unit).__mro__[ORIGINAL].__name__ for unit in units_of(module))
    logger.info(
        "%s sharded over %d processes", ", ".join(f"{n} x {b}" for b, n in blocks.items()), accelerator.num_processes
    )
    plugin.transformer_cls_names_to_wrap = names
    return module, optimizer


def block_classes(module: nn.Module) -> list[str]:
    """Class names of the blocks that a model repeats.

    These are the classes that diffusers' models list (``_repeated_blocks``, else ``_no_split_modules``) and that occur
    more than once; if there are none, classes that occur more than once in a ``ModuleList``.
    """
    count = Counter(type(m).__name__ for m in module.modules())
    named: set[str] = set()
    for part in module.modules():
        own = getattr(part, "_repeated_blocks", None) or getattr(part, "_no_split_modules", None) or ()
        named.update(name for name in own if count[name] > 1)
    if not named:
        for part in module.modules():
            if isinstance(part, nn.ModuleList):
                listed = Counter(type(m).__name__ for m in part)
                named.update(name for name, times in listed.items() if times > 1)
    return sorted(named)


def make_contiguous(module: nn.Module) -> None:
    """Put the weights into torch's default memory format, the only one that can be sharded.

    They are always copied: a channels-last weight of a 1 x 1 convolution reports itself contiguous with other strides.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _checkpoint_activations(module: nn.Module) -> None:
    able: list[Any] = [m for m in module.modules() if getattr(m, "_supports_gradient_checkpointing", False)]
    if not able:
        raise DavaeError(
            f"{LAUNCHER} sets fsdp_activation_checkpointing, but no model in {type(module).__name__} supports "
            "gradient checkpointing: set it to false"
        )
    for model in able:
        model.enable_gradient_checkpointing()


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """Wrap a small module beside a sharded one (a discriminator) in DDP: whole in every process, gradients averaged."""
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def leave_constants(module: nn.Module) -> None:
    """Keep DDP from sending to the other processes what training does not change.

    These are buffers, in every step, and weights that rest in main memory, at the beginning.
    """
    constant = [name for name, _ in module.named_buffers() if name not in changing_buffers(module)]
    constant += [name for name, p in module.named_parameters() if isinstance(p, RestingParameter)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, constant)


def synchronise_norms(module: nn.Module) -> None:
    """Let the batch norms that learn compute their statistics over the images of all processes; on CUDA only.

    The layers change their class in place: names, weights, hooks, and whoever holds a layer, stay as they are.
    """
    learning: list[Any] = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in learning:
        norm.__class__ = nn.SyncBatchNorm
        norm.process_group = None  # all processes


def unsynced(accelerator: Accelerator, module: nn.Module) -> AbstractContextManager[Any]:
    """Context in which gradients are accumulated locally and not averaged over the processes.

    A sharded model averages in every micro-step nevertheless: deferring it would keep whole gradients in memory.
    """
    if isinstance(module, FSDPModule):
        return nullcontext()
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return accelerator.no_sync(module)


ORIGINAL = 2
"""Position of a sharded module's original class in its MRO: ``[FSDPBlock, FSDPModule, Block, ...]``."""


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Context in which a sharded module has all its weights in every process. All ranks must enter it.

    Methods other than ``forward`` then work, and no rank waits for another. The weights must not be moved or cast
    meanwhile. Does nothing to a module that is not sharded.
    """
    units = units_of(module)
    if units:  # usually done by the first step; a run resumed at its end makes none
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


def unshard_for_good(module: nn.Module) -> None:
    """Undo the sharding of a module permanently; it then has all its weights in every process.

    For use after training: export moves, casts and merges weights, which a sharded module does not allow.
    All ranks must call this. Does nothing to a module that is not sharded.
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
    """The separately sharded parts of a module, itself included; empty if it is not sharded."""
    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _reshards(unit: Any) -> bool:
    """Whether a unit frees its gathered weights after ``forward``."""
    return any(group._reshard_after_forward for group in unit._get_fsdp_state()._fsdp_param_groups)


def _leave_fsdp(unit: Any) -> None:
    """Undo what ``fully_shard`` did to a module other than its parameters; torch has no function for it."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    state = unit._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    _module_state_mapping.pop(unit, None)
    for key in (STATE_KEY, REGISTRY_KEY):
        unit.__dict__.pop(key, None)
    unit.__class__ = type(unit).__mro__[ORIGINAL]
