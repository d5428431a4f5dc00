"""LoRA on any transformer: also on classes that diffusers gives no adapter methods (PixArt, DiT)."""

from typing import Any

from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from davae.errors import DavaeError


def attach_lora(transformer: Any, config: LoraConfig, adapter_name: str = "default") -> None:
    """Add an adapter to the transformer, in place; its own weights stay as they are.

    Raises:
        DavaeError: an adapter is attached already, or none of the targets is part of the transformer.
    """
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
    configs: dict[str, LoraConfig] = getattr(transformer, "peft_config", None) or {}
    if not any(isinstance(module, BaseTunerLayer) for module in transformer.modules()):
        return None
    if len(configs) != 1:
        raise DavaeError(
            f"the transformer has {len(configs)} adapters ({', '.join(configs)}): keep one, see delete_adapters"
        )
    return next(iter(configs.items()))


def merge_lora(transformer: Any) -> None:
    """Add the adapter to the weights it adapts and remove it, in place; without an adapter nothing happens."""
    if attached_lora(transformer) is None:
        return
    for module in transformer.modules():
        if isinstance(module, BaseTunerLayer) and not module.merged:
            module.merge(safe_merge=True)
    if hasattr(transformer, "unload_lora"):
        transformer.unload_lora()
    else:
        recurse_remove_peft_layers(transformer)
        del transformer.peft_config
