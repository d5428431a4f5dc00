"""The published VA-VAE (LDM names) as diffusers' ``AutoencoderKL``.

VA-VAE is an LDM autoencoder whose latent was aligned with a vision model in training (Yao et al. 2025,
arXiv 2501.01423). Some files also contain that model, its projection and the losses, which only training needs.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import AutoencoderKL
from torch import Tensor

from davae.errors import DavaeError
from davae.interop.checking import channel_statistics, filled, require, set_aside
from davae.interop.official_autoencoders import ldm_class, ldm_config, translate_ldm
from davae.models.base_adapters.image import LDMAutoencoderKL

logger = logging.getLogger(__name__)
_WHAT = "an LDM autoencoder"
_EMA = "model_ema."
_EMA_COUNTERS = ("model_ema.decay", "model_ema.num_updates")
_UNUSED = {
    "loss.": "used in training only",
    "foundation_model.": "the vision model that the latent was aligned with in training",
    "linear_proj.": "the alignment's projection in training",
}


def convert_vavae(
    state_dict: Mapping[str, Tensor],
    *,
    resolution: int = 256,
    statistics: tuple[Sequence[float], Sequence[float]] | None = None,
) -> tuple[AutoencoderKL, list[str]]:
    """The autoencoder in eval mode; every tensor is accounted for.

    Args:
        state_dict: official names (``encoder.*``, ``decoder.*``, ``quant_conv.*``, ``post_quant_conv.*``, perhaps
            ``model_ema.*``, ``loss.*``, ``foundation_model.*``, ``linear_proj.*``).
        resolution: image size in pixels that it was trained at, for the config.
        statistics: per-channel mean and standard deviation of the latent, with which LightningDiT normalises it.

    Returns:
        The model, and the names of official tensors that it does not use.

    Raises:
        DavaeError: tensors are missing, unknown or of another shape (all are listed).
    """
    weights, unused = set_aside(state_dict, _UNUSED)
    weights, left = _prefer_ema(weights)
    needed = ("encoder.conv_in.weight", "encoder.conv_out.weight", "quant_conv.weight", "post_quant_conv.weight")
    require(weights, needed, _WHAT)
    channels = weights["post_quant_conv.weight"].shape[1]
    config: dict[str, Any] = {
        **ldm_config(weights, "encoder."),
        "latent_channels": channels,
        "sample_size": resolution,
        "scaling_factor": 1.0,
        "force_upcast": False,
    }
    if statistics is not None:
        mean, std = channel_statistics(statistics, channels)
        config |= {"latents_mean": mean, "latents_std": std}
    model_class = AutoencoderKL if ldm_class(weights, {"encoder.": config}) == "AutoencoderKL" else LDMAutoencoderKL
    converted: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        part, _, inner = name.partition(".")
        if part in ("encoder", "decoder"):
            inner, tensor = translate_ldm(inner, tensor, len(config["block_out_channels"]))
        converted[f"{part}.{inner}"] = tensor
    return filled(model_class(**config), converted, _WHAT), unused + left


def _prefer_ema(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """EMA weights in place of the others, where the file has them; LDM writes their names without dots."""
    averaged = {name: tensor for name, tensor in weights.items() if name.startswith(_EMA)}
    if not averaged:
        return weights, []
    kept = {name: tensor for name, tensor in weights.items() if name not in averaged}
    counters = [name for name in _EMA_COUNTERS if averaged.pop(name, None) is not None]
    by_name = {_EMA + name.replace(".", ""): name for name in kept}
    unknown = sorted(averaged.keys() - by_name.keys())
    if unknown:
        raise DavaeError(f"this is not {_WHAT} as published. unexpected: {', '.join(unknown)}")
    logger.info("using the EMA weights of %d tensors (model_ema)", len(averaged))
    return kept | {by_name[name]: tensor for name, tensor in averaged.items()}, counters
