"""The forms in which the authors' training saves its SD3 transformer, merged into one official state dict.

* A complete transformer, with branches (``pos_embed.proj.base_conv``, ``extra_conv``) or with plain wider layers.
* A checkpoint of the trained weights: patch embedder and head (``tokenizer_patch_embed.*``, ``project_out.*``), under
  ``model_state_dict``; the LoRA is in a file of its own. The EMA (``ema_state_dict``) includes the LoRA.
  The other weights are the base's.

A LoRA is merged into the weights as ``W + B A``: the authors train with alpha equal to the rank.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from davae.choices import ChannelOrder
from davae.errors import DavaeError
from davae.interop.official_sd3_transformer import load_transformer, split_plain_layers
from davae.latents import LatentLayout
from davae.runtime.model_files import chosen_variant, component_files, stored_keys
from davae.runtime.weight_files import about_file, read_finite, read_state_dict

logger = logging.getLogger(__name__)

_PARTS = ("transformer_blocks.", "pos_embed.", "proj_out.")
_ALIASES = {"tokenizer_patch_embed.": "pos_embed.", "project_out.": "proj_out."}
_LORA_A, _LORA_B = ".lora_A.weight", ".lora_B.weight"


def is_transformer(names: Mapping[str, Any]) -> bool:
    """Whether the tensors are an SD3 transformer's, whole or in part."""
    return any(_tidy(name).startswith(_PARTS) for name in names)


def convert_transformer(
    official: Mapping[str, Tensor], base: Path, *, lora: Path | None = None, order: ChannelOrder = "detail_first"
) -> tuple[SD3Transformer2DModel, LatentLayout]:
    """A plain, wider transformer, base channels first, from the tensors of a file.

    Args:
        official: in one of the forms above.
        base: folder of the pretrained transformer, or of a pipeline with it. Its configuration is always read, its
            weights only if the file contains just the trained ones.
        lora: file of the LoRA, if it is separate.
        order: channel order in plain wider layers; for branches it is known.

    Returns:
        The transformer in eval mode in the file's dtype, and its channels.

    Raises:
        DavaeError: a tensor is missing, unknown, of another shape or there twice, or the base does not fit.
    """
    place = _folder(base)
    config = SD3Transformer2DModel.load_config(place)
    weights = _renamed(official)
    pairs = _take_lora(weights)
    if lora is not None:
        with about_file(lora):
            if pairs:
                raise DavaeError("the transformer's file already contains a LoRA: leave out --lora")
            separate = _renamed(read_state_dict(lora))
            pairs = _take_lora(separate)
            if separate or not pairs:
                raise DavaeError(f"this is not a LoRA. unexpected: {', '.join(sorted(separate)) or 'no tensor'}")
    weights = split_plain_layers(weights, int(config["in_channels"]), order)
    if not any(name.startswith("transformer_blocks.") for name in weights):
        if not pairs:
            logger.warning("no LoRA: the transformer's blocks are taken unchanged from %s", place)
        weights = _completed(weights, place)
    _add_lora(weights, pairs)
    return load_transformer(weights, config)


def _folder(base: Path) -> Path:
    for place in (base / "transformer", base):
        if (place / "config.json").is_file():
            return place
    raise DavaeError(f"{base} holds no transformer: there is no config.json in it or in its transformer/")


def _tidy(name: str) -> str:
    """The name without the prefixes and infixes of wrappers."""
    while name.startswith("transformer."):
        name = name.removeprefix("transformer.")
    for alias, ours in _ALIASES.items():
        if name.startswith(alias):
            name = ours + name.removeprefix(alias)
    return name.replace(".base_layer.", ".").replace(".default.weight", ".weight")  # PEFT's, of a LoRA


def _renamed(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, tensor in official.items():
        ours = _tidy(name)
        # The authors' wrapper saves its patch embedder and head under two names each.
        if ours in found and not torch.equal(found[ours], tensor):
            raise DavaeError(f"'{ours}' is there twice, with different values (the second time as '{name}')")
        found[ours] = tensor
    return found


def _take_lora(weights: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """LoRA pairs (A [rank, in], B [out, rank]) by the name of their layer, removed from ``weights``."""
    ends = (_LORA_A, _LORA_B)
    layers = {name.removesuffix(end) for end in ends for name in weights if name.endswith(end)}
    absent = [layer + end for layer in sorted(layers) for end in ends if layer + end not in weights]
    if absent:
        raise DavaeError(f"a LoRA has two matrices per layer. missing: {', '.join(absent)}")
    return {layer: (weights.pop(layer + _LORA_A), weights.pop(layer + _LORA_B)) for layer in layers}


def _add_lora(weights: dict[str, Tensor], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for layer, (a, b) in sorted(pairs.items()):
        name = f"{layer}.weight"
        if name not in weights:
            raise DavaeError(f"the LoRA adapts '{layer}', which the transformer does not have")
        weight = weights[name]
        if a.ndim != 2 or b.ndim != 2 or (len(b), a.shape[1]) != weight.shape or len(a) != b.shape[1]:
            raise DavaeError(
                f"the LoRA of '{layer}' has matrices {tuple(a.shape)} and {tuple(b.shape)}, which do not fit its "
                f"weight {tuple(weight.shape)}"
            )
        weights[name] = (weight.float() + b.float() @ a.float()).to(weight.dtype)
    if pairs:
        logger.info("merged the LoRA of %d layers", len(pairs))


def _completed(trained: Mapping[str, Tensor], place: Path) -> dict[str, Tensor]:
    """The trained weights, completed by the base's (all but patch embedder and head), in the base's dtype."""
    base: dict[str, Tensor] = {}
    variant = chosen_variant(place, component_files([place]), None)
    files = stored_keys(place, variant)
    if not files:
        raise DavaeError(
            f"the file contains only the trained weights, and {place} has no diffusion_pytorch_model*.safetensors "
            "with the others"
        )
    for file in sorted(set(files.values())):
        base |= read_finite(file)
    own = {name: tensor for name, tensor in base.items() if not name.startswith(("pos_embed.proj.", "proj_out."))}
    logger.info("added %d tensors of %s to the %d trained ones", len(own), place, len(trained))
    dtype = next(tensor.dtype for tensor in own.values() if tensor.is_floating_point())
    return own | {name: tensor.to(dtype) for name, tensor in trained.items()}
