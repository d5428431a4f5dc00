"""LoRA on any transformer, also on classes without adapter methods in diffusers (PixArt, DiT)."""

import dataclasses
from typing import Any

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from davae.errors import DavaeError
from davae.warm_start.plain_state import unwrapped


def is_target(name: str, target: str) -> bool:
    """Whether a LoRA target means the layer of this name, by peft's rule: the name itself, or its end after a dot."""
    return name == target or name.endswith(f".{target}")


def attach_lora(transformer: Any, config: LoraConfig, adapter_name: str = "default") -> None:
    """Add an adapter to the transformer, in place; the transformer's own weights do not change.

    Raises:
        DavaeError: an adapter is attached already, no module matches the targets, or the configuration also trains
            whole modules (``modules_to_save``) or token embeddings.
    """
    transformer = unwrapped(transformer)
    for option in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, option, None):
            raise DavaeError(
                f"the LoRA's configuration has {option} {getattr(config, option)}: a LoRA file cannot hold what is "
                "trained in full. Leave it out: the widened layers are trained and saved in full anyway, and other "
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
        raise DavaeError(f"{type(transformer).__name__} does not accept this adapter: {error}") from error


def attached_lora(transformer: nn.Module) -> tuple[str, LoraConfig] | None:
    """Name and configuration of the adapter attached to a transformer; None if there is none.

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
    """As :func:`attached_lora`, with ``lora_alpha`` multiplied by the weight that ``set_adapters`` gave the adapter.

    Raises:
        DavaeError: more than one adapter is attached, or the adapter is switched off in a layer or weighted
            differently in different layers, which a LoRA file cannot store.
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
            "(enable_lora(), enable_adapters() or set_adapters) to save it, or remove it (unload_lora_weights(), "
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
    """The scaling of the configuration: ``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA."""
    rank = module.r[name] ** 0.5 if _by_root(module, name) else module.r[name]
    return float(module.lora_alpha[name] / rank)


def _by_root(module: Any, name: str) -> bool:
    use: Any = getattr(module, "use_rslora", {})
    return bool(use.get(name) if isinstance(use, dict) else use)


def merge_lora(transformer: Any) -> None:
    """Add the adapter to the weights it adapts and remove it, in place; without an adapter do nothing.

    Modules trained in full beside the LoRA (``modules_to_save``) replace the original ones.

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
    remove_lora(transformer)


def remove_lora(transformer: Any) -> None:
    """Take the attached adapter off, in place, without adding it to the weights."""
    transformer = unwrapped(transformer)
    if hasattr(transformer, "unload_lora"):
        transformer.unload_lora()
    else:
        recurse_remove_peft_layers(transformer)
        del transformer.peft_config
