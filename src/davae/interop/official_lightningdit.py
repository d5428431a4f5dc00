"""Official LightningDiT weights to :class:`davae.LightningDiTTransformer2DModel`.

The configuration is inferred from the weights, every official tensor is accounted for, and the stored position
tables are compared with those that davae computes. Nothing is skipped, padded or guessed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.interop.checking import check_keys, require
from davae.models.lightningdit import SIZES, LightningDiTTransformer2DModel, rope_table, sincos_table
from davae.runtime.weight_files import about_file, read_state_dict, strip_wrappers

#: Official module -> davae's. Modules of a block are listed without their ``blocks.N.``.
_MODULES = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "time_embed.linear_1",
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "class_embed",
    "final_layer.norm_final": "norm_out",
    "final_layer.adaLN_modulation.1": "modulation_out",
    "final_layer.linear": "proj_out",
}
_BLOCK_MODULES = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "attn.proj": "attn.to_out.0",
    "adaLN_modulation.1": "modulation",
    "mlp.w3": "ff.net.2",  # SwiGLU's output projection
    "mlp.fc1": "ff.net.0.proj",  # without gate, GELU
    "mlp.fc2": "ff.net.2",
}
_WHAT = "a LightningDiT state dict"
_TABLE_TOLERANCE = 1e-4  # covers float32 rounding of the largest angles; another table differs by about 1


def load(
    path: str | Path, *, weights: Literal["ema", "model"] = "ema", num_attention_heads: int | None = None
) -> LightningDiTTransformer2DModel:
    """A model in eval mode from an official checkpoint file.

    Args:
        path: ``.safetensors``, or a ``.pt`` that holds only tensors.
        weights: which weights to take if the file has both; the authors sample with the EMA.
        num_attention_heads: needed only where :func:`convert` asks for it.

    Raises:
        DavaeError: see :func:`convert` and :func:`davae.runtime.weight_files.read_state_dict`.
    """
    entries = tuple(dict.fromkeys((weights, "ema", "model", "state_dict")))
    official = read_state_dict(path, entries=entries)
    with about_file(path):
        config, state_dict = convert(official, num_attention_heads=num_attention_heads)
    model = LightningDiTTransformer2DModel(**config)
    model.load_state_dict(state_dict, strict=True)
    return model.eval()


def convert(
    state_dict: Mapping[str, Tensor], *, num_attention_heads: int | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and state dict of davae's model from an official state dict.

    Args:
        state_dict: official names, with or without the prefixes ``module.`` and ``_orig_mod.``.
        num_attention_heads: inferred from the weights if the model has RoPE or QK-norm; otherwise required.

    Raises:
        DavaeError: tensors are missing, unexpected or of another shape (named), a position table
            is not the one davae's model computes, or `num_attention_heads` is required.
    """
    official = strip_wrappers(state_dict)
    config = _read_config(official, num_attention_heads)
    tables = _check_tables(official, config)
    converted: dict[str, Tensor] = {}
    unexpected = []
    for name, tensor in official.items():
        if name in tables:
            continue
        ours = _translate(name, tensor)
        converted |= ours
        if not ours:
            unexpected.append(name)
    with torch.device("meta"):
        expected = LightningDiTTransformer2DModel(**config).state_dict()
    check_keys(converted, expected, _WHAT, unexpected)
    return config, converted


def size_name(config: Mapping[str, Any]) -> str:
    """The name of this configuration in papers, ``XL/1``, or else ``width 16, depth 1, 2 heads, patch 1``."""
    shape = {key: config[key] for key in ("num_layers", "hidden_size", "num_attention_heads")}
    for name, size in SIZES.items():
        if shape == size:
            return f"{name}/{config['patch_size']}"
    return (
        f"width {config['hidden_size']}, depth {config['num_layers']}, "
        f"{config['num_attention_heads']} heads, patch {config['patch_size']}"
    )


def _translate(name: str, tensor: Tensor) -> dict[str, Tensor]:
    # davae's names and tensors for one official tensor; empty if the name is unknown.
    module, _, kind = name.rpartition(".")
    prefix, modules = "", _MODULES
    if module.startswith("blocks."):
        _, number, module = module.split(".", 2)
        prefix, modules = f"transformer_blocks.{number}.", _BLOCK_MODULES
        if module == "attn.qkv":
            rows = zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True)
            return {f"{prefix}attn.{part}.{kind}": value.clone() for part, value in rows}
        if module == "mlp.w12":  # officially SiLU acts on the first half, in diffusers' SwiGLU on the second
            gate, value = tensor.chunk(2)
            return {f"{prefix}ff.net.0.proj.{kind}": torch.cat([value, gate])}
    return {f"{prefix}{modules[module]}.{kind}": tensor} if module in modules else {}


def _read_config(official: Mapping[str, Tensor], num_attention_heads: int | None) -> dict[str, Any]:
    needed = (
        "x_embedder.proj.weight",
        "final_layer.linear.weight",
        "y_embedder.embedding_table.weight",
        "pos_embed",
        "blocks.0.attn.qkv.weight",
        "blocks.0.adaLN_modulation.1.weight",
    )
    require(official, needed, _WHAT)
    hidden, channels, patch, _ = official["x_embedder.proj.weight"].shape
    out_channels = len(official["final_layer.linear.weight"]) // patch**2
    rope, qk_norm = "feat_rope.freqs_cos" in official, "blocks.0.attn.q_norm.weight" in official
    if rope:
        num_attention_heads = hidden // official["feat_rope.freqs_cos"].shape[1]
    elif qk_norm:
        num_attention_heads = hidden // len(official["blocks.0.attn.q_norm.weight"])
    elif num_attention_heads is None:
        raise DavaeError("without RoPE and QK-norm the weights do not determine num_attention_heads: please give it")
    return {
        "sample_size": math.isqrt(official["pos_embed"].shape[1]) * patch,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": None if out_channels == channels else out_channels,
        "hidden_size": hidden,
        "num_layers": len({name.split(".")[1] for name in official if name.startswith("blocks.")}),
        "num_attention_heads": num_attention_heads,
        "num_classes": len(official["y_embedder.embedding_table.weight"]) - 1,  # the last row is the null label
        "qk_norm": qk_norm,
        "swiglu": "blocks.0.mlp.w12.weight" in official,
        "rope": rope,
        "rms_norm": "blocks.0.norm1.weight" in official,
        "adaln_shift": len(official["blocks.0.adaLN_modulation.1.weight"]) == 6 * hidden,
    }


def _check_tables(official: Mapping[str, Tensor], config: Mapping[str, Any]) -> set[str]:
    # The names of the stored tables, once they are equal to those that davae's model computes.
    side, hidden = config["sample_size"] // config["patch_size"], config["hidden_size"]
    ours = {"pos_embed": sincos_table(side, side, hidden)[None]}
    if config["rope"]:
        cos, sin = rope_table(side, side, hidden // config["num_attention_heads"])
        # The official table holds each angle twice, once for each channel of its pair.
        ours |= {"feat_rope.freqs_cos": cos.repeat_interleave(2, 1), "feat_rope.freqs_sin": sin.repeat_interleave(2, 1)}
    for name, table in ours.items():
        if name not in official:
            raise DavaeError(f"this is not a LightningDiT state dict as published. missing: {name}")
        stored = official[name].float()
        if stored.shape != table.shape or (stored - table).abs().max() > _TABLE_TOLERANCE:
            raise DavaeError(
                f"the position table {name} {tuple(stored.shape)} is not the published one for "
                f"{side} x {side} tokens: the model was trained with other positions and cannot be converted"
            )
    return set(ours)
