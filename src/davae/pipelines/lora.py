"""LoRA on any transformer: also on classes that diffusers gives no adapter methods (PixArt, DiT)."""

import dataclasses
from typing import Any

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from davae.errors import DavaeError
from davae.warm_start.plain_state import unwrapped


def attach_lora(transformer: Any, config: LoraConfig, adapter_name: str = "default") -> None:
    """Add an adapter to the transformer, in place; its own weights stay as they are.

    Raises:
        DavaeError: an adapter is attached already, none of the targets is part of the transformer, or the
            configuration asks for whole modules to be trained beside the LoRA.
    """
    transformer = unwrapped(transformer)
    for option in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, option, None):
            raise DavaeError(
                f"the LoRA's configuration has {option} {getattr(config, option)}: what is trained whole has no place "
                "in a LoRA file. Leave it out: the widened layers are trained in full and saved without it, and other "
                "modules can be target_modules"
            )
    if attached_lora(transformer) is not None:
        raise DavaeError("the transformer has an adapter already: merge or unload it first")
    try:
        if hasattr(transformer, "add_adapter"):
            transformer.add_adapter(config, adapter_name=adapter_name)
        else:
            inject_adapter_in_model(config, transformer, adapter_name=adapter_name)
    except ValueError as error:  # peft's, with the targets' names
        raise DavaeError(f"{type(transformer).__name__} takes no such adapter: {error}") from error


def attached_lora(transformer: nn.Module) -> tuple[str, LoraConfig] | None:
    """Name and configuration of the adapter of a transformer; None where there is none.

    Raises:
        DavaeError: more than one adapter is attached.
    """
    transformer = unwrapped(transformer)
    configs: dict[str, LoraConfig] = getattr(transformer, "peft_config", None) or {}
    if not any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in transformer.modules()):
        return None
    if len(configs) != 1:
        raise DavaeError(
            f"the transformer has {len(configs)} adapters ({', '.join(configs)}): keep one, see delete_adapters"
        )
    return next(iter(configs.items()))


def acting_lora(transformer: nn.Module) -> tuple[str, LoraConfig] | None:
    """As :func:`attached_lora`, but as the adapter acts: its ``lora_alpha`` times the weight of ``set_adapters``.

    Raises:
        DavaeError: more than one adapter is attached, or it is switched off, or weighted differently in different
            layers: no LoRA file says that.
    """
    attached = attached_lora(transformer)
    if attached is None:
        return None
    name, config = attached
    wrapped = {n: m for n, m in unwrapped(transformer).named_modules() if _holds(m, name)}
    off = [n for n, m in wrapped.items() if not m.merged and (m.disable_adapters or name not in m.active_adapters)]
    if off:
        raise DavaeError(
            f"the LoRA '{name}' is switched off in {len(off)} of {len(wrapped)} layers, such as {off[0]}: switch it on "
            "(enable_lora(), enable_adapters() or set_adapters) to save it, or take it away (unload_lora_weights(), "
            "unload_lora()) to save without it"
        )
    weights = {n: m.scaling[name] / _own_scaling(m, name) for n, m in wrapped.items() if m.lora_alpha[name]}
    first = next(iter(weights.values()), 1.0)
    odd = [n for n, weight in weights.items() if abs(weight - first) > 1e-6 * max(1.0, abs(first))]
    if odd:
        raise DavaeError(
            f"the LoRA '{name}' has weight {weights[odd[0]]:.4g} in {odd[0]} and {first:.4g} in other layers: give it "
            "one weight, set_adapters(name, weight), before saving it"
        )
    if abs(first - 1.0) <= 1e-6:
        return name, config
    return name, dataclasses.replace(
        config,
        lora_alpha=config.lora_alpha * first,
        alpha_pattern={layer: alpha * first for layer, alpha in config.alpha_pattern.items()},
    )


def _holds(module: nn.Module, name: str) -> bool:
    return isinstance(module, BaseTunerLayer) and name in getattr(module, "scaling", ())


def _own_scaling(module: Any, name: str) -> float:
    """What the configuration says: ``alpha / r``, or ``alpha / sqrt(r)``."""
    rank = module.r[name] ** 0.5 if _by_root(module, name) else module.r[name]
    return float(module.lora_alpha[name] / rank)


def _by_root(module: Any, name: str) -> bool:
    use: Any = getattr(module, "use_rslora", {})
    return bool(use.get(name) if isinstance(use, dict) else use)


def merge_lora(transformer: Any) -> None:
    """Add the adapter to the weights it adapts and remove it, in place; without an adapter nothing happens.

    Modules that were trained whole beside the LoRA (``modules_to_save``) take the place of the original ones.

    Raises:
        DavaeError: as :func:`acting_lora`.
    """
    attached = acting_lora(transformer)
    if attached is None:
        return
    transformer = unwrapped(transformer)
    for name, module in list(transformer.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            path, _, key = name.rpartition(".")
            whole = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=[attached[0]])
            setattr(transformer.get_submodule(path), key, whole)
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer) and not module.merged:
            module.merge(safe_merge=True)
    if hasattr(transformer, "unload_lora"):
        transformer.unload_lora()
    else:
        recurse_remove_peft_layers(transformer)
        del transformer.peft_config
