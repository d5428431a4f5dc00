"""ControlNets, which read the same latents as a transformer and have copies of its first layers.

The control image is encoded by the pipeline's autoencoder and enters as another latent. With zero weights for the new
channels a ControlNet has the same inputs as before: the base latents of the noise and of the downscaled control image.
"""

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from davae.errors import WarmStartError
from davae.warm_start.description import ChannelDescription, input_layer
from davae.warm_start.dummy_inputs import Dummy, dummy, pack
from davae.warm_start.known.packed import PACKED, side_of
from davae.warm_start.registry import describe, described

_BLOCKS = ("controlnet_blocks",)


def _masked(transformer: ModelMixin, key: str, unit: int) -> bool:
    """Whether a mask follows the control latent."""
    extra = transformer.config[key]
    if extra not in (0, unit):
        raise WarmStartError(f"config.{key} is {extra}: supported are 0, and {unit} for the mask of inpainting")
    return bool(extra)


@dummy
def _sd3(d: Dummy) -> dict[str, Any]:
    control = d.concatenated(2)[1]
    if d.config.extra_conditioning_channels:
        control = torch.cat([control, (control[:, :1] > 0).to(control)], dim=1)
    width = d.config.joint_attention_dim
    return {
        "hidden_states": d.latent,
        "controlnet_cond": control,
        "timestep": d.time(1000),
        "pooled_projections": d.normal(d.config.pooled_projection_dim),
        "encoder_hidden_states": None if width is None else d.text(width),
        "return_dict": False,
    }


def _sd3_places(transformer: ModelMixin) -> ChannelDescription:
    if not transformer.config.use_pos_embed:
        raise WarmStartError("it uses the token embedding of its transformer (use_pos_embed is false)")
    mask = " | 1" if _masked(transformer, "extra_conditioning_channels", 1) else ""
    return ChannelDescription(
        inputs=(*input_layer("pos_embed.proj"), *input_layer("pos_embed_input.proj", f"c{mask}")),
        outputs=(),
        counts={"in_channels": "c"},
        residuals=_BLOCKS,
        dummy_inputs=_sd3,
    )


describe("SD3ControlNetModel", _sd3_places)


def _tokens(d: Dummy) -> dict[str, Any]:
    side, _ = side_of(d)
    return {
        "hidden_states": d.packed(side),
        "controlnet_cond": pack(d.concatenated(2)[1], side),
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "timestep": d.time(),
        "return_dict": False,
    }


@dummy
def _flux(d: Dummy) -> dict[str, Any]:
    side, _ = side_of(d)
    modes = d.config.num_mode
    return {
        **_tokens(d),
        "controlnet_mode": None if modes is None else d.integers(modes, 1),
        "pooled_projections": d.normal(d.config.pooled_projection_dim),
        "guidance": d.guidance(),
        "img_ids": d.positions(side),
        "txt_ids": d.zeros(d.text_tokens, 3),
    }


def _flux_places(transformer: ModelMixin) -> ChannelDescription:
    if transformer.config.conditioning_embedding_channels is not None:
        raise WarmStartError(
            "it reads the control image in pixels, 16 x 16 per token (conditioning_embedding_channels), but an "
            "upgraded pipeline has more per token"
        )
    return ChannelDescription(
        inputs=(*input_layer("x_embedder", "in_channels"), *input_layer("controlnet_x_embedder", "in_channels")),
        outputs=(),
        counts={"in_channels": PACKED[:2]},
        sizes={},
        packing=2,
        residuals=(*_BLOCKS, "controlnet_single_blocks"),
        dummy_inputs=_flux,
    )


describe("FluxControlNetModel", _flux_places)


@dummy
def _qwen_image(d: Dummy) -> dict[str, Any]:
    side, _ = side_of(d)
    tokens = _tokens(d)
    control = tokens["controlnet_cond"]
    if extra := d.config.extra_condition_channels:
        tokens["controlnet_cond"] = torch.cat([control, (control[..., :extra] > 0).to(control)], dim=2)
    return {
        **tokens,
        "encoder_hidden_states_mask": None if d.latent.is_meta else d.text_mask(),
        "img_shapes": [[(1, *d.grid(side))]] * d.batch,
    }


def _qwen_places(transformer: ModelMixin) -> ChannelDescription:
    mask = " | 4" if _masked(transformer, "extra_condition_channels", 4) else ""  # packed two by two
    return ChannelDescription(
        inputs=(*input_layer("img_in", "in_channels"), *input_layer("controlnet_x_embedder", f"in_channels{mask}")),
        outputs=(),
        counts={"in_channels": PACKED[:2]},
        sizes={},
        packing=2,
        residuals=_BLOCKS,
        dummy_inputs=_qwen_image,
    )


describe("QwenImageControlNetModel", _qwen_places)


@described(
    "SanaControlNetModel",
    inputs=input_layer("patch_embed.proj"),  # of the noisy latent and of the control latent
    outputs=(),
    counts={"in_channels": "c"},
    residuals=_BLOCKS,
)
def _sana(d: Dummy) -> dict[str, Any]:
    return {
        "hidden_states": d.latent,
        "controlnet_cond": d.concatenated(2)[1],
        "encoder_hidden_states": d.text(d.config.caption_channels),
        "encoder_attention_mask": d.text_mask(torch.int64),
        "timestep": d.time(1000),
        "return_dict": False,
    }
