"""LDM's encoder and decoder in the names and options of diffusers' ``AutoencoderKL``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from davae.errors import DavaeError

_NORM_GROUPS = 32  # fixed in LDM's code

#: LDM names of a part -> diffusers names.
_NAMES = (
    (r"mid\.block_1\.", "mid_block.resnets.0."),
    (r"mid\.block_2\.", "mid_block.resnets.1."),
    (r"mid\.attn_1\.", "mid_block.attentions.0."),
    (r"^down\.(\d+)\.block\.", r"down_blocks.\1.resnets."),
    (r"^down\.(\d+)\.attn\.", r"down_blocks.\1.attentions."),
    (r"^down\.(\d+)\.downsample\.", r"down_blocks.\1.downsamplers.0."),
    (r"^up\.(\d+)\.block\.", r"up_blocks.\1.resnets."),
    (r"^up\.(\d+)\.attn\.", r"up_blocks.\1.attentions."),
    (r"^up\.(\d+)\.upsample\.", r"up_blocks.\1.upsamplers.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"^norm_out\.", "conv_norm_out."),
)
_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def translate_ldm(name: str, tensor: Tensor, levels: int) -> tuple[str, Tensor]:
    """One LDM tensor under its diffusers name; attention's 1x1 convolutions become linear layers.

    Args:
        name: inside the encoder or the decoder, for example ``mid.attn_1.q.weight``.
        tensor: its value.
        levels: number of resolutions, ``len(ch_mult)``.
    """
    if re.search(r"\.attn(_1)?\.", name):
        module, kind = name.rsplit(".", 1)
        module, _, inner = module.rpartition(".")
        name = f"{module}.{_ATTENTION_NAMES.get(inner, inner)}.{kind}"
        tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
    for pattern, ours in _NAMES:
        name = re.sub(pattern, ours, name)
    # LDM counts decoder levels from the finest, diffusers from the coarsest.
    name = re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
    return name, tensor


def ldm_config(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """``AutoencoderKL`` arguments of an LDM encoder (its decoder is built from the same numbers).

    Raises:
        DavaeError: there is no encoder under ``prefix``.
    """
    inside = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    levels = 1 + max(_numbers(inside, r"^down\.(\d+)\."), default=-1)
    first = [f"{prefix}down.{level}.block.0.conv1.weight" for level in range(levels)]
    absent = [name for name in first if name not in weights]
    if levels == 0 or absent:
        named = absent[0] if absent else f"{prefix}down.0.…"
        raise DavaeError(f"no LDM encoder under '{prefix}': there is no tensor '{named}'")
    attends = [any(name.startswith(f"down.{level}.attn.") for name in inside) for level in range(levels)]
    return {
        "block_out_channels": [len(weights[name]) for name in first],
        "down_block_types": [f"{'Attn' * attends[level]}DownEncoderBlock2D" for level in range(levels)],
        "up_block_types": [f"{'Attn' * attends[level]}UpDecoderBlock2D" for level in reversed(range(levels))],
        "layers_per_block": 1 + max(_numbers(inside, r"^down\.0\.block\.(\d+)\.")),
        "norm_num_groups": _NORM_GROUPS,
        "mid_block_add_attention": any(name.startswith("mid.attn_1.") for name in inside),
    }


def ldm_class(weights: Mapping[str, Tensor], configs: Mapping[str, dict[str, Any]]) -> str:
    """``AutoencoderKL``, or the class for encoders whose stem is narrower than their first level.

    Args:
        weights: official names.
        configs: prefix of an encoder -> its :func:`ldm_config`; gets ``stem_channels`` where one has another
            stem.
    """
    stems = {prefix: len(weights[f"{prefix}conv_in.weight"]) for prefix in configs}
    if all(stems[prefix] == config["block_out_channels"][0] for prefix, config in configs.items()):
        return "AutoencoderKL"
    for prefix, config in configs.items():
        config["stem_channels"] = stems[prefix]
    return "LDMAutoencoderKL"


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}
