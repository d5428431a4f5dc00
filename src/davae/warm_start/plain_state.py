"""State of a model besides its weights and configuration, which a rebuilt model would lack.

Hooks, caches, adapters and quantised storage belong to one module object: copied in part they would break, not copied
they would be lost. So a check before every upgrade asks the user to switch them off, upgrade, and switch them on
again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import WarmStartError

#: Dtypes of weights that can be copied and compared directly.
PLAIN_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def unwrapped(module: Any) -> Any:
    """The module inside the wrapper of ``torch.compile``; other values unchanged."""
    while isinstance(module, nn.Module) and "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"]
    return module


def require_plain(model: nn.Module, what: str) -> None:
    """Reject a model with state that an upgrade could not transfer.

    Args:
        model: the model; plain hooks are checked by :func:`require_no_hooks`.
        what: the model's name in errors, such as ``the transformer``.

    Raises:
        WarmStartError: it has such state; the message names it, its module, and how to switch it off.
    """
    _refuse(what, next(_states(model), None))


def require_no_hooks(model: nn.Module, what: str, built: nn.Module | None = None) -> None:
    """Reject a model with hooks or a replaced ``forward`` that its user has added.

    Args:
        model: the model.
        what: the model's name in errors.
        built: a new model of the same class; hooks that its constructor adds are accepted.

    Raises:
        WarmStartError: it has hooks; the message names the module.
    """
    fresh = {} if built is None else dict(built.named_modules())
    for name, module in model.named_modules():
        for kind in _HOOKS:
            hooks = [hook for hook in getattr(module, kind, {}).values() if not getattr(hook, "mends_a_class", False)]
            if len(hooks) > len(getattr(fresh.get(name), kind, ())):
                _refuse(what, (f"a hook on {name or 'itself'}", "call remove() on its handle"))
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "__self__", None) is not module:
            _refuse(what, (f"a replaced forward on {name or 'itself'}", "restore it with `del module.forward`"))


def _refuse(what: str, state: tuple[str, str] | None) -> None:
    if state is not None:
        raise WarmStartError(
            f"{what} has {state[0]}, which cannot be carried over to new layers: switch it off ({state[1]}), upgrade, "
            "then switch it on for the result"
        )


def _states(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Each state that cannot be carried over: its description, and how to switch it off."""
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "config", {}).get("quantization_config"):
        yield "quantised weights", "load the weights that they were made from, and quantise the saved result"
    for name, module in model.named_modules():
        where = name or "itself"
        hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
        if hooks:
            kinds = ", ".join(sorted(hooks))
            yield (
                f"hooks of diffusers on {where} ({kinds})",
                "disable_cache() for a cache; for layerwise casting or offloading, load the model again without it",
            )
        if hasattr(module, "_hf_hook"):
            yield f"hooks of accelerate on {where}", "load the model without offloading or device_map"
        if "_orig_mod" in module._modules:
            yield f"the compiled part {where}", "replace it by its original, `compiled._orig_mod`"
        if any(cls.__module__.startswith("peft.") for cls in type(module).__mro__):
            yield (
                f"an adapter on {where}",
                "remove adapters: fuse_lora and unload_lora, or merge_and_unload, or unload alone",
            )
        if nn.utils.parametrize.is_parametrized(module):
            yield f"parametrizations on {where}", "torch.nn.utils.parametrize.remove_parametrizations"
        if "IPAdapter" in type(module).__name__ or "IPAdapter" in type(getattr(module, "processor", None)).__name__:
            yield f"an IP-Adapter on {where}", "pipe.unload_ip_adapter()"
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if type(tensor) not in (Tensor, nn.Parameter):
            kind = type(tensor).__name__
            yield f"weights that are not plain tensors ({name} is a {kind})", "load the model unquantised"
        floating = tensor.is_floating_point() or tensor.is_complex()
        if isinstance(tensor, nn.Parameter) and not tensor.is_meta and tensor.dtype not in PLAIN_DTYPES:
            yield f"quantised weights ({name} is stored as {tensor.dtype})", "widen first, then quantise"
        if floating and tensor.dtype not in PLAIN_DTYPES and not isinstance(tensor, nn.Parameter):
            yield f"quantised buffers ({name} is stored as {tensor.dtype})", "widen first, then quantise"
