"""FSDP2: the weights, gradients and moments of a model spread over the processes (ZeRO-3; ZeRO-2 on request).

accelerate shards, as its configuration says; here stands what a training needs around that: which blocks are sharded
by themselves, whole tensors for checkpoints, and whole models for validation and export. Sharded tensors are
``DTensor``; to make one whole is a collective operation, so **all ranks must call it**, also where only
the first one writes.
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
from torch.nn.parallel import DistributedDataParallel

from davae.errors import DavaeError
from davae.runtime.processes import LAUNCHER, refuse_deepspeed

logger = logging.getLogger(__name__)


def begin_accelerator(**options: Any) -> Accelerator:
    """An accelerator for one training, sharding with FSDP2 where the launcher's configuration asks for it.

    One process may train several stages one after the other, each with its own precision.

    Args:
        options: of :class:`accelerate.Accelerator`.

    Raises:
        DavaeError: the configuration asks for a form of FSDP that is not supported, for FSDP in float16, or for
            DeepSpeed.
    """
    refuse_deepspeed()
    _forget_the_training_before()
    plugin = _plugin()
    if plugin is not None and options.get("mixed_precision") == "fp16":
        raise DavaeError(
            f"loop.precision=fp16, while {LAUNCHER} asks for FSDP: every process would scale its losses as its "
            "own shards need it. Take loop.precision=bf16"
        )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if plugin is not None and accelerator.use_distributed:
        # Weights stay in float32 and autocast decides what is computed in half precision, as without sharding:
        # FSDP's own policy would also cast latents, times and normalisation.
        plugin.mixed_precision_policy = MixedPrecisionPolicy()
        _engage(plugin)
    return accelerator


def _forget_the_training_before() -> None:
    """accelerate keeps what it is in a shared state, and finds neither another precision nor FSDP a second time."""
    AcceleratorState._reset_state()
    state = PartialState._shared_state
    if state.get("distributed_type") == DistributedType.FSDP:
        kind = state["device"].type
        state["distributed_type"] = DistributedType[f"MULTI_{'GPU' if kind == 'cuda' else kind.upper()}"]


def _engage(plugin: FullyShardedDataParallelPlugin) -> None:
    """accelerate turns FSDP on for GPUs and their like alone; torch's runs on the CPU as well, where it is tested."""
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin


def _plugin() -> FullyShardedDataParallelPlugin | None:
    """What the launcher says about FSDP (``accelerate launch`` leaves it in the environment)."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    if os.environ.get("FSDP_VERSION") != "2":
        raise DavaeError(f"{LAUNCHER} asks for the first version of FSDP: set fsdp_version: 2")
    plugin = FullyShardedDataParallelPlugin()
    unsupported = {
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing_offload": plugin.activation_checkpointing_offload,
        "fsdp_ignored_modules": plugin.ignored_modules,
        "fsdp_offload_params": os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true",
    }
    for key, value in unsupported.items():
        if value:
            raise DavaeError(f"{LAUNCHER} sets {key}, which is not supported: leave it out")
    return plugin


def is_sharding(accelerator: Accelerator) -> bool:
    """Whether models are sharded in this training."""
    return accelerator.distributed_type == DistributedType.FSDP


def shard(accelerator: Accelerator, module: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
    """Shard a module and point its optimizer at the shards; returns both, prepared.

    Each repeated block (see :func:`block_classes`) is gathered by itself when it is computed, the rest once a step. The
    module itself is changed. With ``fsdp_activation_checkpointing`` the models' own gradient checkpointing is
    turned on, which keeps the names of the weights as they are.

    Args:
        accelerator: of :func:`begin_accelerator`.
        module: its ``forward`` is the whole step; weights may be on the CPU.
        optimizer: over its trained parameters.
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
        "%s spread over %d processes", ", ".join(f"{n} x {b}" for b, n in blocks.items()), accelerator.num_processes
    )
    plugin.transformer_cls_names_to_wrap = names
    return module, optimizer


def block_classes(module: nn.Module) -> list[str]:
    """Names of the classes of blocks that a model repeats.

    They are what diffusers' models name themselves (``_repeated_blocks``, else ``_no_split_modules``), as far as they
    occur more than once; where a model names none, what its ``ModuleList`` repeat.
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
    """Put the weights into torch's plain memory order, the only one that can be sharded.

    A channels-last weight of a 1 x 1 convolution calls itself contiguous, and is not in that order.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def _checkpoint_activations(module: nn.Module) -> None:
    able: list[Any] = [m for m in module.modules() if getattr(m, "_supports_gradient_checkpointing", False)]
    if not able:
        raise DavaeError(
            f"{LAUNCHER} sets fsdp_activation_checkpointing, but {type(module).__name__} holds no model that can "
            "compute its activations again: set it to false"
        )
    for model in able:
        model.enable_gradient_checkpointing()


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """A small module beside a sharded one (a discriminator): whole in every process, gradients averaged."""
    return DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None)


def unsynced(accelerator: Accelerator, module: nn.Module) -> AbstractContextManager[Any]:
    """Within the context gradients are only summed up, not averaged over the processes.

    A sharded model averages in every micro-step: to wait would hold whole gradients in memory.
    """
    if isinstance(module, FSDPModule):
        return nullcontext()
    if isinstance(module, DistributedDataParallel):
        return module.no_sync()
    return accelerator.no_sync(module)


ORIGINAL = 2
"""Where a sharded module's own class stands among its classes: ``[FSDPBlock, FSDPModule, Block, ...]``."""


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Within the context a sharded module is an ordinary one with all its weights, in every process.

    Methods besides ``forward`` then work, and no rank waits for another. The weights must not be moved or cast
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


def unshard_for_good(module: nn.Module) -> None:
    """Make a sharded module an ordinary one for good, with all its weights in every process.

    For what comes after training: export moves, casts and merges weights, which a sharded module does not allow.
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
