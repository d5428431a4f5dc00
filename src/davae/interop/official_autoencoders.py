"""Official DA-VAE autoencoder weights into :class:`davae.AutoencoderDA`.

Two kinds were published: the ImageNet autoencoder ("detail" mode, LDM names) and the SD3 autoencoder ("diff"
mode, diffusers names). The configuration is read off the weights, every tensor is accounted for, and those
that the official forward pass never uses are named.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from davae.errors import DavaeError
from davae.models import AutoencoderDA, PatchDiscriminator

logger = logging.getLogger(__name__)

_LDM_NORM_GROUPS = 32  # fixed in LDM's code

#: LDM names of a part -> diffusers names.
_LDM_NAMES = (
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
_LDM_ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}

_IMAGENET_UNUSED = {
    "da.encoder.conv_out.": "bypassed: the detail encoder ends before it",
    "da.decoder.conv_in.": "bypassed: the joint decoder begins after it",
    "loss.": "belongs to training, see convert_discriminator",
}
_SD3_UNUSED = {
    "vae.encoder.conv_out.": "bypassed: the detail encoder ends before it",
    "vae.decoder.conv_in.": "bypassed: the joint decoder begins after it",
}


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
        base: the base VAE with its decoder, which official files do not hold; without it ``decode_base``
            raises. Its encoder must be the one in ``state_dict``.
        base_resolution: image size of the base, for the config.
        statistics: per-channel mean and standard deviation of all ``C + D`` channels, base first, as the
            diffusion model was trained with them.
        detail_dropout: for further training.

    Returns:
        The model in eval mode, and the names of official tensors that have no use in it.

    Raises:
        DavaeError: tensors are missing, unknown or of another shape (all are listed), or ``base`` is another
            VAE.
    """
    weights, unused = _set_aside(state_dict, _IMAGENET_UNUSED)
    _require(weights, ("base_encoder.conv_out.weight", "base_quant_conv.weight", "da.da_up.conv.weight"))
    base_channels = len(weights["base_quant_conv.weight"]) // 2
    channels = weights["da.da_up.conv.weight"].shape[1]
    base_config = {
        **_ldm_config(weights, "base_encoder."),
        "latent_channels": base_channels,
        "sample_size": base_resolution,
        "scaling_factor": 1.0,
        "force_upcast": False,
        "use_quant_conv": True,
    }
    detail_statistics: dict[str, list[float]] = {}
    if statistics is not None:
        mean, std = (list(map(float, values)) for values in statistics)
        if len(mean) != channels or len(std) != channels:
            raise DavaeError(f"statistics of {len(mean)} and {len(std)} channels, the latent has {channels}")
        base_config |= {"latents_mean": mean[:base_channels], "latents_std": std[:base_channels]}
        detail_statistics = {"detail_mean": mean[base_channels:], "detail_std": std[base_channels:]}
    branch_config: dict[str, Any] = {
        **_ldm_config(weights, "da.encoder."),
        "latent_channels": base_channels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }
    base_class = _ldm_class(weights, base_config, branch_config)
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        converted |= _translate_imagenet(name, tensor, len(branch_config["block_out_channels"]))
    model = _build(
        converted,
        base,
        base_class=base_class,
        base_config=base_config,
        scale=_scale_of(weights, "da.da_up", weights["da.da_down.conv.weight"].shape[1]),
        detail_channels=channels - base_channels,
        antialias=False,
        clamp_base_image=False,
        base_latent_space="raw",
        decoder_channel_order="base_first",
        detail_dropout=detail_dropout,
        branch_config=branch_config,
        **detail_statistics,
    )
    return model, unused


def convert_sd3(
    state_dict: Mapping[str, Tensor],
    vae_config: Mapping[str, Any],
    *,
    base: AutoencoderKL | None = None,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
    detail_dropout: float = 0.0,
) -> tuple[AutoencoderDA, list[str]]:
    """The SD3 autoencoder, "diff" mode: scaled base latent, clamped base image, details first in the decoder.

    Official images are in [0, 1]; ours in [-1, 1]: official = (ours + 1) / 2, clamped after decoding.

    Args:
        state_dict: official names (``vae.*``, ``original_vae_model.vae.*``, ``dc_down.*``, ``dc_up.*``).
        vae_config: config of the SD3 VAE, an ``AutoencoderKL`` without quant convolutions.
        base: the SD3 VAE, for its decoder where the file does not hold it; without either ``decode_base``
            raises.
        statistics: per-channel mean and standard deviation of the ``D`` detail channels.
        detail_dropout: for further training.

    Returns:
        The model in eval mode, and the names of official tensors that have no use in it.

    Raises:
        DavaeError: tensors are missing, unknown or of another shape (all are listed), or ``base`` is another
            VAE.
    """
    weights, unused = _set_aside(state_dict, _SD3_UNUSED)
    _require(weights, ("vae.encoder.conv_in.weight", "dc_up.conv.weight", "dc_down.conv.weight"))
    base_config = {key: value for key, value in vae_config.items() if not key.startswith("_")}
    if base_config.get("use_quant_conv", True) or base_config.get("use_post_quant_conv", True):
        raise DavaeError("vae_config must be that of the SD3 VAE, which has no quant convolutions")
    names = {
        "vae.encoder.": "detail_encoder.",
        "vae.decoder.": "joint_decoder.",
        "original_vae_model.vae.": "base.",
        "dc_down.": "down.",
        "dc_up.": "up.",
    }
    converted = {}
    for name, tensor in weights.items():
        start = next((start for start in names if name.startswith(start)), "")
        converted[names.get(start, "") + name.removeprefix(start)] = tensor
    detail_channels = weights["dc_up.conv.weight"].shape[1] - int(base_config["latent_channels"])
    mean, std = (None, None) if statistics is None else (list(map(float, values)) for values in statistics)
    model = _build(
        converted,
        base,
        base_class="AutoencoderKL",
        base_config=base_config,
        scale=_scale_of(weights, "dc_up", base_config["block_out_channels"][-1]),
        detail_channels=detail_channels,
        antialias=False,
        clamp_base_image=True,
        base_latent_space="scaled",
        decoder_channel_order="detail_first",
        detail_dropout=detail_dropout,
        detail_mean=mean,
        detail_std=std,
    )
    return model, unused


def convert_discriminator(
    state_dict: Mapping[str, Tensor], prefix: str = "loss.discriminator."
) -> PatchDiscriminator:
    """The official PatchGAN, whose size is read off its weights.

    Raises:
        DavaeError: there is none under ``prefix``, or tensors are missing, unknown or of another shape.
    """
    weights = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    _require(weights, ("main.0.weight",), prefix)
    strided = sum(tensor.ndim == 4 for tensor in weights.values()) - 2  # all but the last two convolutions
    model = PatchDiscriminator(filters=len(weights["main.0.weight"]), layers=strided)
    _check(weights, model.state_dict())
    model.load_state_dict(weights)
    return model


def _build(converted: dict[str, Tensor], base: AutoencoderKL | None, **config: Any) -> AutoencoderDA:
    """The model with these weights; the base's decoder comes from ``base`` where the weights lack it."""
    has_decoder = any(name.startswith("base.decoder.") for name in converted)
    if base is not None:
        for name, tensor in base.state_dict().items():
            name = f"base.{name}"
            if name not in converted and name.startswith(("base.decoder.", "base.post_quant_conv.")):
                converted[name] = tensor
            elif name not in converted or not torch.equal(converted[name].to(tensor), tensor):
                raise DavaeError(f"the given base is another VAE than the official file's: '{name}' differs")
        use_post_quant = base.config.use_post_quant_conv
        config["base_config"] |= {"use_post_quant_conv": use_post_quant}
        has_decoder = True
    model = AutoencoderDA(has_base_decoder=has_decoder, **config)
    _check(converted, model.state_dict())
    model.load_state_dict(converted)
    return model.eval()


def _translate_imagenet(name: str, tensor: Tensor, levels: int) -> dict[str, Tensor]:
    if name.startswith("base_quant_conv."):
        return {f"base.quant_conv.{name.removeprefix('base_quant_conv.')}": tensor}
    for start, ours in (("da.da_down.", "down."), ("da.da_up.", "up.")):
        if name.startswith(start):
            return {ours + name.removeprefix(start): tensor}
    parts = {
        "base_encoder.": "base.encoder.",
        "da.encoder.": "detail_encoder.",
        "da.decoder.": "joint_decoder.",
    }
    for start, ours in parts.items():
        if name.startswith(start):
            inner, tensor = _translate_ldm(name.removeprefix(start), tensor, levels)
            return {ours + inner: tensor}
    return {name: tensor}  # unknown: the check names it


def _translate_ldm(name: str, tensor: Tensor, levels: int) -> tuple[str, Tensor]:
    """One LDM tensor under its diffusers name; attention's 1x1 convolutions become linear layers."""
    if re.search(r"\.attn(_1)?\.", name):
        module, kind = name.rsplit(".", 1)
        module, _, inner = module.rpartition(".")
        name = f"{module}.{_LDM_ATTENTION_NAMES.get(inner, inner)}.{kind}"
        tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
    for pattern, ours in _LDM_NAMES:
        name = re.sub(pattern, ours, name)
    # LDM counts decoder levels from the finest, diffusers from the coarsest.
    name = re.sub(r"^up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", name)
    return name, tensor


def _ldm_config(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """AutoencoderKL arguments of an LDM encoder (its decoder is built from the same numbers)."""
    inside = [name.removeprefix(prefix) for name in weights if name.startswith(prefix)]
    levels = 1 + max(_numbers(inside, r"^down\.(\d+)\."), default=-1)
    if levels == 0:
        raise DavaeError(f"no LDM encoder under '{prefix}': there is no tensor '{prefix}down.0.…'")
    widths = [len(weights[f"{prefix}down.{level}.block.0.conv1.weight"]) for level in range(levels)]
    attends = [any(name.startswith(f"down.{level}.attn.") for name in inside) for level in range(levels)]
    return {
        "block_out_channels": widths,
        "down_block_types": [f"{'Attn' * attends[level]}DownEncoderBlock2D" for level in range(levels)],
        "up_block_types": [f"{'Attn' * attends[level]}UpDecoderBlock2D" for level in reversed(range(levels))],
        "layers_per_block": 1 + max(_numbers(inside, r"^down\.0\.block\.(\d+)\.")),
        "norm_num_groups": _LDM_NORM_GROUPS,
        "mid_block_add_attention": any(name.startswith("mid.attn_1.") for name in inside),
    }


def _ldm_class(weights: Mapping[str, Tensor], base: dict[str, Any], branch: dict[str, Any]) -> str:
    """``AutoencoderKL``, or the class for encoders whose stem is narrower than their first level."""
    stems = [len(weights[f"{part}.conv_in.weight"]) for part in ("base_encoder", "da.encoder")]
    configs = (base, branch)
    if all(stem == config["block_out_channels"][0] for stem, config in zip(stems, configs)):
        return "AutoencoderKL"
    for stem, config in zip(stems, configs):
        config["stem_channels"] = stem
    return "LDMAutoencoderKL"


def _numbers(names: Iterable[str], pattern: str) -> set[int]:
    return {int(match[1]) for name in names if (match := re.match(pattern, name))}


def _scale_of(weights: Mapping[str, Tensor], up: str, features: int) -> int:
    cells = len(weights[f"{up}.conv.weight"]) / features
    scale = math.isqrt(int(cells))
    if scale**2 != cells:
        raise DavaeError(
            f"'{up}.conv.weight' has {len(weights[f'{up}.conv.weight'])} rows: not {features} times a square"
        )
    return scale


def _set_aside(
    state_dict: Mapping[str, Tensor], reasons: Mapping[str, str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights that are used, and names of those known to be of no use, logged with the reason."""
    unused = [name for name in state_dict if name.startswith(tuple(reasons))]
    for start, reason in reasons.items():
        names = [name for name in unused if name.startswith(start)]
        if names:
            logger.info("not used: %s* (%d tensors), %s", start, len(names), reason)
    return {name: tensor for name, tensor in state_dict.items() if name not in unused}, unused


def _require(weights: Mapping[str, Tensor], names: Sequence[str], prefix: str = "") -> None:
    absent = [prefix + name for name in names if name not in weights]
    if absent:
        raise DavaeError(f"this is not an official state dict as published. missing: {', '.join(absent)}")


def _check(converted: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    faults = {
        "missing": sorted(expected.keys() - converted.keys()),
        "unexpected": sorted(converted.keys() - expected.keys()),
        "of another shape": [
            f"{name} {tuple(converted[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & converted.keys())
            if converted[name].shape != expected[name].shape
        ],
    }
    if any(faults.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in faults.items() if names)
        raise DavaeError(f"this is not an official state dict as published. {listed}")
