"""Classes that take the latent as an image, with text or a class label as condition."""

from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from davae.warm_start.description import ChannelDescription, input_layer, output_layer
from davae.warm_start.dummy_inputs import Dummy, dummy
from davae.warm_start.registry import describe, described


@described(
    "SD3Transformer2DModel",
    inputs=input_layer("pos_embed.proj", "in_channels"),  # convolution of kernel and stride p
    outputs=output_layer("proj_out", "p p out_channels"),
    counts={"in_channels": ("c", "c | 1 | c"), "out_channels": "c"},
)
def _sd3(d: Dummy) -> dict[str, Any]:
    # Inpainting configurations take [latent, mask, masked latent] on the channel axis.
    latents, masks = divmod(d.config.in_channels, d.latent.shape[1])
    parts = d.concatenated(latents)
    if masks:
        parts.insert(1, (d.latent[:, :1] > 0).to(d.latent))
    return {
        "hidden_states": torch.cat(parts, dim=1),
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "pooled_projections": d.normal(d.config.pooled_projection_dim),
        "timestep": d.time(1000),
    }


@described(
    "LightningDiTTransformer2DModel", inputs=input_layer("patch_embed"), outputs=output_layer("proj_out", "p p c")
)
def _class_label(d: Dummy) -> dict[str, Any]:
    labels = d.integers(d.config.num_classes + 1)
    return {"hidden_states": d.latent, "timestep": d.time(), "class_labels": labels}


@described("SanaTransformer2DModel", inputs=input_layer("patch_embed.proj"), outputs=output_layer("proj_out", "p p c"))
def _sana(d: Dummy) -> dict[str, Any]:
    return {
        "hidden_states": d.latent,
        "encoder_hidden_states": d.text(d.config.caption_channels),
        "encoder_attention_mask": d.text_mask(torch.int64),
        "timestep": d.time(1000),
        "guidance": d.guidance(),
    }


@described(
    "AuraFlowTransformer2DModel",
    inputs=input_layer("pos_embed.proj", "c p p"),  # linear over flattened patches
    outputs=output_layer("proj_out", "p p c"),
)
def _auraflow(d: Dummy) -> dict[str, Any]:
    return {
        "hidden_states": d.latent,
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "timestep": d.time(),
    }


@described(
    "Lumina2Transformer2DModel",
    inputs=input_layer("x_embedder", "p p c"),
    outputs=output_layer("norm_out.linear_2", "p p c"),
)
def _lumina2(d: Dummy) -> dict[str, Any]:
    return {
        "hidden_states": d.latent,
        "encoder_hidden_states": d.text(d.config.cap_feat_dim),
        "encoder_attention_mask": d.text_mask(),
        "timestep": d.time(),
    }


@dummy
def _prx(d: Dummy) -> dict[str, Any]:
    return {
        "hidden_states": d.latent,
        "timestep": d.time(),
        "encoder_hidden_states": d.text(d.config.context_in_dim),
        "attention_mask": d.text_mask(),
    }


def _prx_places(transformer: ModelMixin) -> ChannelDescription:
    bottleneck = transformer.config.bottleneck_size is not None
    return ChannelDescription(
        inputs=input_layer("img_in.0" if bottleneck else "img_in", "c p p"),
        outputs=output_layer("final_layer.linear", "c p p"),
        counts={"in_channels": "c"},
        dummy_inputs=_prx,
    )


describe("PRXTransformer2DModel", _prx_places)


@described(
    "ErnieImageTransformer2DModel",
    inputs=input_layer("x_embedder.proj", "in_channels"),  # still an image after the packing
    outputs=output_layer("final_linear", "p p out_channels"),
    counts={"in_channels": ("c", "c 2 2"), "out_channels": ("c", "c 2 2")},
    sample_pattern="out_channels",
    packing=2,
)
def _ernie(d: Dummy) -> dict[str, Any]:
    side = d.packing(d.config.in_channels)
    return {
        "hidden_states": torch.nn.functional.pixel_unshuffle(d.latent, side),
        "timestep": d.time(1000),
        "text_bth": d.text(d.config.text_in_dim),
        "text_lens": torch.full((d.batch,), d.text_tokens, device=d.latent.device),
    }


@described(
    "HiDreamImageTransformer2DModel",
    inputs=input_layer("x_embedder.proj", "p p c"),
    outputs=output_layer("final_layer.linear", "p p c"),
)
def _hidream(d: Dummy) -> dict[str, Any]:
    t5, llama = d.config.caption_channels
    layers = max(d.config.llama_layers) + 1
    return {
        "hidden_states": d.latent,
        "timesteps": d.time(1000),
        "encoder_hidden_states_t5": d.text(t5),
        "encoder_hidden_states_llama3": list(d.normal(layers, d.text_tokens, llama).unbind(1)),
        "pooled_embeds": d.normal(d.config.text_emb_dim),
    }


@dummy
def _hunyuan_image(d: Dummy) -> dict[str, Any]:
    config = d.config
    latents = config.in_channels // d.latent.shape[1]
    latent = torch.cat(d.concatenated(latents), dim=1)
    second = {}
    if config.text_embed_2_dim is not None and not d.latent.is_meta:  # indexes by the values of a mask
        second = {"encoder_hidden_states_2": d.text(config.text_embed_2_dim), "encoder_attention_mask_2": d.text_mask()}
    return {
        "hidden_states": latent if len(config.patch_size) == 2 else latent[:, :, None],
        "timestep": d.time(1000),
        "timestep_r": d.time(1000) if config.use_meanflow else None,
        "encoder_hidden_states": d.text(config.text_embed_dim),
        "encoder_attention_mask": d.text_mask(),
        "guidance": d.guidance(),
        **second,
    }


def _hunyuan_image_places(transformer: ModelMixin) -> ChannelDescription:
    patch = transformer.config.patch_size
    return ChannelDescription(
        inputs=input_layer("x_embedder.proj", "in_channels"),
        outputs=output_layer("proj_out", "c t p p"),
        counts={"in_channels": ("c", "c | c"), "out_channels": "c"},  # the refiner takes two latents
        sizes={"p": patch[-1], "t": patch[0] if len(patch) == 3 else 1},
        dummy_inputs=_hunyuan_image,
    )


describe("HunyuanImageTransformer2DModel", _hunyuan_image_places)


def _sizes(d: Dummy, *names: str) -> dict[str, Any]:
    height, width = d.latent.shape[-2:]
    sizes = torch.tensor([[8.0 * height, 8.0 * width]]).expand(d.batch, 2).to(d.latent.device)
    return {name: torch.zeros_like(sizes) if name == "crop_coords" else sizes for name in names}


@described(
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    inputs=input_layer("patch_embed.proj", "in_channels p p"),
    outputs=output_layer("proj_out", "c p p"),
    counts={"in_channels": ("c", "c | c"), "out_channels": "c"},
)
def _cogview(d: Dummy) -> dict[str, Any]:
    latents = d.config.in_channels // d.latent.shape[1]  # two with a control latent after the noisy one
    return {
        "hidden_states": torch.cat(d.concatenated(latents), dim=1),
        "encoder_hidden_states": d.text(d.config.text_embed_dim),
        "timestep": d.time(1000),
        **_sizes(d, "original_size", "target_size", "crop_coords"),
    }


@described(
    "GlmImageTransformer2DModel",
    inputs=input_layer("image_projector.proj", "c p p"),
    outputs=output_layer("proj_out", "c p p"),
)
def _glm_image(d: Dummy) -> dict[str, Any]:
    rows, columns = d.grid(d.config.patch_size)
    # The forward indexes by this mask; on the meta device, where it has no values, by an empty index.
    prior = d.integers(d.config.prior_vq_quantizer_codebook_size, rows * columns)
    return {
        "hidden_states": d.latent,
        "encoder_hidden_states": d.text(d.config.text_embed_dim),
        "prior_token_id": prior,
        "prior_token_drop": prior.new_zeros(0) if prior.is_meta else torch.zeros_like(prior, dtype=torch.bool),
        "timestep": d.time(1000),
        **_sizes(d, "target_size", "crop_coords"),
    }
