"""Official DA-VAE autoencoder weights to :class:`davae.AutoencoderDA`.

Two kinds were published: the ImageNet autoencoder ("detail" mode, LDM names) and the SD3 autoencoder ("diff"
mode, diffusers names). They differ only in their names and in a few options, listed in :class:`_Published`. The
configuration is inferred from the weights, every tensor is accounted for, and those that the official forward pass
never uses are named.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from davae.errors import DavaeError
from davae.interop.checking import channel_statistics, filled, require, set_aside
from davae.models import AutoencoderDA

_WHAT = "an official state dict"
_ENCODER_END = "bypassed: the detail encoder ends before it"
_DECODER_START = "bypassed: the joint decoder begins after it"


@dataclass(frozen=True)
class _Published:
    """The names and options of one published kind.

    Attributes:
        parts: prefixes of official names -> davae's.
        down, up: official names of the new blocks.
        unused: prefixes of names that the official forward never reads -> why.
        needed: tensors from which the configuration is inferred.
        ldm: encoders and decoders have LDM's names.
        options: arguments of :class:`AutoencoderDA`.
    """

    parts: dict[str, str]
    down: str
    up: str
    unused: dict[str, str]
    needed: tuple[str, ...]
    ldm: bool
    options: dict[str, Any]


_IMAGENET = _Published(
    parts={
        "base_quant_conv.": "base.quant_conv.",
        "base_encoder.": "base.encoder.",
        "da.encoder.": "detail_encoder.",
        "da.decoder.": "joint_decoder.",
        "da.da_down.": "down.",
        "da.da_up.": "up.",
    },
    down="da.da_down",
    up="da.da_up",
    unused={
        "da.encoder.conv_out.": _ENCODER_END,
        "da.decoder.conv_in.": _DECODER_START,
        "loss.": "used in training only",
    },
    needed=("base_encoder.conv_out.weight", "base_quant_conv.weight"),
    ldm=True,
    options={
        "antialias": False,
        "clamp_base_image": False,
        "base_latent_space": "raw",
        "decoder_channel_order": "base_first",
    },
)
_SD3 = _Published(
    parts={
        "original_vae_model.vae.": "base.",
        "vae.encoder.": "detail_encoder.",
        "vae.decoder.": "joint_decoder.",
        "dc_down.": "down.",
        "dc_up.": "up.",
    },
    down="dc_down",
    up="dc_up",
    unused={"vae.encoder.conv_out.": _ENCODER_END, "vae.decoder.conv_in.": _DECODER_START},
    needed=("vae.encoder.conv_in.weight",),
    ldm=False,
    options={
        "antialias": False,
        "clamp_base_image": True,
        "base_latent_space": "scaled",
        "decoder_channel_order": "detail_first",
    },
)


def convert_imagenet(
    state_dict: Mapping[str, Tensor],
    *,
    base: AutoencoderKL | None = None,
    base_resolution: int = 256,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    detail_dropout: float = 0.1,
) -> tuple[AutoencoderDA, list[str]]:
    """The ImageNet autoencoder: base first, raw base latent, bicubic reduction without antialiasing.

    Args:
        state_dict: official names (``base_encoder.*``, ``base_quant_conv.*``, ``da.*``, perhaps ``loss.*``).
        base: the base VAE with its decoder, which official files do not contain; without it ``decode_base``
            raises. Its encoder must be the one in ``state_dict``.
        base_resolution: image size of the base in pixels, for the config.
        statistics: per-channel mean and standard deviation of all ``C + D`` channels, base first, with which
            the diffusion model was trained.
        detail_dropout: probability, for further training.

    Returns:
        The model in eval mode, and the names of official tensors that it does not use.

    Raises:
        DavaeError: tensors are missing, unknown or of another shape (all are listed), or ``base`` is another
            VAE.
    """
    weights, unused = _open(_IMAGENET, state_dict)
    channels = len(weights["base_quant_conv.weight"]) // 2
    base_config = {
        **ldm_config(weights, "base_encoder."),
        "latent_channels": channels,
        "sample_size": base_resolution,
        "scaling_factor": 1.0,
        "force_upcast": False,
        "use_quant_conv": True,
    }
    details: dict[str, list[float]] = {}
    if statistics is not None:
        mean, std = channel_statistics(statistics, weights[f"{_IMAGENET.up}.conv.weight"].shape[1])
        base_config |= {"latents_mean": mean[:channels], "latents_std": std[:channels]}
        details = {"detail_mean": mean[channels:], "detail_std": std[channels:]}
    branch_config: dict[str, Any] = {
        **ldm_config(weights, "da.encoder."),
        "latent_channels": channels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    model = _assemble(
        _IMAGENET,
        weights,
        base,
        base_class=ldm_class(weights, {"base_encoder.": base_config, "da.encoder.": branch_config}),
        base_config=base_config,
        branch_config=branch_config,
        detail_dropout=detail_dropout,
        **details,
    )
    return model, unused


def convert_sd3(
    state_dict: Mapping[str, Tensor],
    vae_config: Mapping[str, Any],
    *,
    base: AutoencoderKL | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[AutoencoderDA, list[str]]:
    """The SD3 autoencoder, "diff" mode: scaled base latent, clamped base image, details first in the decoder.

    Official images are in [0, 1], davae's in [-1, 1]: official = (davae + 1) / 2, clamped after decoding.

    Args:
        state_dict: official names (``vae.*``, ``original_vae_model.vae.*``, ``dc_down.*``, ``dc_up.*``).
        vae_config: config of the SD3 VAE, an ``AutoencoderKL`` without quant convolutions.
        base: the SD3 VAE, for its decoder if the file does not contain it; without either ``decode_base``
            raises.
        statistics: per-channel mean and standard deviation of the ``D`` detail channels.

    Returns:
        The model in eval mode, and the names of official tensors that it does not use.

    Raises:
        DavaeError: tensors are missing, unknown or of another shape (all are listed), or ``base`` is another
            VAE.
    """
    weights, unused = _open(_SD3, state_dict)
    base_config = {key: value for key, value in vae_config.items() if not key.startswith("_")}
    if base_config.get("use_quant_conv", True) or base_config.get("use_post_quant_conv", True):
        raise DavaeError("vae_config must be that of the SD3 VAE, which has no quant convolutions")
    details: dict[str, list[float]] = {}
    if statistics is not None:
        added = weights[f"{_SD3.up}.conv.weight"].shape[1] - int(base_config["latent_channels"])
        mean, std = channel_statistics(statistics, added, "the detail latent")
        details = {"detail_mean": mean, "detail_std": std}
    model = _assemble(
        _SD3, weights, base, base_class="AutoencoderKL", base_config=base_config, detail_dropout=0.0, **details
    )
    return model, unused


def _open(kind: _Published, state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors that are used, and the names of the unused ones."""
    weights, unused = set_aside(state_dict, kind.unused)
    require(weights, (*kind.needed, f"{kind.up}.conv.weight", f"{kind.down}.conv.weight"), _WHAT)
    return weights, unused


def _assemble(
    kind: _Published,
    weights: Mapping[str, Tensor],
    base: AutoencoderKL | None,
    *,
    base_config: dict[str, Any],
    **config: Any,
) -> AutoencoderDA:
    """The model with these weights; the base's decoder comes from ``base`` if the weights lack it."""
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        start = next((start for start in kind.parts if name.startswith(start)), "")
        inner = name.removeprefix(start)
        if kind.ldm and start.endswith(("encoder.", "decoder.")):
            levels = len(config["branch_config"]["block_out_channels"])
            inner, tensor = translate_ldm(inner, tensor, levels)
        converted[kind.parts.get(start, "") + inner] = tensor  # an unknown name stays, and the check reports it
    if base is not None:
        converted = _with_decoder_of(base, converted)
        base_config = base_config | {"use_post_quant_conv": base.config.use_post_quant_conv}
    model = AutoencoderDA(
        has_base_decoder=any(name.startswith("base.decoder.") for name in converted),
        base_config=base_config,
        scale=_scale(kind, weights),
        detail_channels=weights[f"{kind.up}.conv.weight"].shape[1] - int(base_config["latent_channels"]),
        **kind.options,
        **config,
    )
    return filled(model, converted, _WHAT)


def _with_decoder_of(base: AutoencoderKL, converted: dict[str, Tensor]) -> dict[str, Tensor]:
    whole = dict(converted)
    for name, tensor in base.state_dict().items():
        name = f"base.{name}"
        if name not in converted and name.startswith(("base.decoder.", "base.post_quant_conv.")):
            whole[name] = tensor
        elif name not in converted or not torch.equal(converted[name].to(tensor), tensor):
            raise DavaeError(f"the given base is not the VAE in the official file: '{name}' differs")
    return whole


def _scale(kind: _Published, weights: Mapping[str, Tensor]) -> int:
    name = f"{kind.up}.conv.weight"
    rows, features = len(weights[name]), weights[f"{kind.down}.conv.weight"].shape[1]
    scale = math.isqrt(rows // features)
    if features * scale**2 != rows:
        raise DavaeError(f"'{name}' has {rows} rows: not {features} times a square")
    return scale


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
    """The diffusers name and value of one LDM tensor; attention's 1x1 convolutions become linear layers.

    Args:
        name: relative to the encoder or decoder, for example ``mid.attn_1.q.weight``.
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
    """``AutoencoderKL`` arguments of an LDM encoder, whose decoder has the same sizes.

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
    """Class name: ``AutoencoderKL``, or ``LDMAutoencoderKL`` if a stem's width is not that of the first level.

    Args:
        weights: official names.
        configs: prefix of an encoder -> its :func:`ldm_config`, to all of which the latter case adds
            ``stem_channels``.
    """
    stems = {prefix: len(weights[f"{prefix}conv_in.weight"]) for prefix in configs}
    if all(stems[prefix] == config["block_out_channels"][0] for prefix, config in configs.items()):
        return "AutoencoderKL"
    for prefix, config in configs.items():
        config["stem_channels"] = stems[prefix]
    return "LDMAutoencoderKL"


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}
