"""Classes that take latents in other forms: lists, frames, one sequence with the text."""

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin

from davae.warm_start.description import ChannelDescription, input_layer, output_layer
from davae.warm_start.dummy_inputs import Dummy, dummy, pack
from davae.warm_start.registry import describe, described


@dummy
def _z_image(d: Dummy) -> dict[str, Any]:
    frames = max(d.config.all_f_patch_size)
    latent = d.latent[:, :, None].expand(-1, -1, frames, -1, -1)
    return {"x": list(latent.unbind(0)), "t": d.time(), "cap_feats": list(d.text(d.config.cap_feat_dim).unbind(0))}


def _z_image_places(transformer: ModelMixin) -> ChannelDescription:
    # One embedder and one head for each patch size, in dictionaries keyed "patch-frames".
    patches = list(zip(transformer.config.all_patch_size, transformer.config.all_f_patch_size, strict=True))
    return ChannelDescription(
        inputs=sum((input_layer(f"all_x_embedder.{p}-{f}", f"{f} {p} {p} c") for p, f in patches), ()),
        outputs=sum((output_layer(f"all_final_layer.{p}-{f}.linear", f"{f} {p} {p} c") for p, f in patches), ()),
        counts={"in_channels": "c"},
        sizes={"p": max(p for p, _ in patches)},
        passes=tuple({"patch_size": p, "f_patch_size": f} for p, f in patches),
        dummy_inputs=_z_image,
    )


describe("ZImageTransformer2DModel", _z_image_places)


@described(
    "BriaFibo2Transformer2DModel",
    inputs=input_layer("x_embedder", "c p p"),
    outputs=output_layer("final_layer.linear", "c p p"),
    counts={"in_channels": "c"},
)
def _bria_fibo2(d: Dummy) -> dict[str, Any]:
    layers = 1 + len(d.config.injection_layer_ids)
    return {
        "hidden_states": d.latent,
        "timestep": d.time(),
        "encoder_hidden_states": d.normal(layers, d.text_tokens, d.config.cap_feat_dim),
    }


@described(
    "OmniGenTransformer2DModel",
    inputs=(*input_layer("patch_embedding.output_image_proj"), *input_layer("patch_embedding.input_image_proj")),
    outputs=output_layer("proj_out", "p p c"),
    counts={"in_channels": "c"},
)
def _omnigen(d: Dummy) -> dict[str, Any]:
    # The prompt contains an image of the latent's size, so that both embedders run.
    rows, columns = d.grid(d.config.patch_size)
    image, text = rows * columns, d.text_tokens
    length = text + image + 1 + image  # prompt with its image, time, the noisy image
    reference = d.concatenated(2)[1]
    device = d.latent.device
    return {
        "hidden_states": d.latent,
        "timestep": d.time(),
        "input_ids": d.integers(d.config.vocab_size, text + image),
        "input_img_latents": [sample[None] for sample in reference],
        "input_image_sizes": {i: [[text, text + image]] for i in range(d.batch)},
        "attention_mask": torch.ones(d.batch, length, length, device=device),
        "position_ids": torch.arange(length, device=device).expand(d.batch, -1),
    }


@described(
    "QwenImage21Transformer2DModel",
    inputs=input_layer("img_in", "c p p"),
    outputs=output_layer("proj_out", "c p p"),
    sample_axis=2,
    sample_pattern="c p p",
)
def _qwen_image21(d: Dummy) -> dict[str, Any]:
    side, device = d.config.patch_size, d.latent.device
    rows, columns = d.grid(side)
    slots = rows * columns // 4  # the language model sees one token for four of the image
    text = torch.zeros(d.batch, d.text_tokens, dtype=torch.bool, device=device)
    return {
        "hidden_states": pack(d.latent, side),
        "encoder_hidden_states": d.text(d.config.context_in_dim),
        "timestep": d.time(),
        "img_shapes": [[(1, rows, columns)]] * d.batch,
        "img_mask": torch.cat([text, text.new_ones(d.batch, slots)], dim=1),
    }


@described(
    "Ideogram4Transformer2DModel",
    # The only pipeline that packs with the channel fastest: [row, column, channel].
    inputs=input_layer("input_proj", "in_channels"),
    outputs=output_layer("final_layer.linear", "in_channels"),
    counts={"in_channels": ("c", "2 2 c")},
    sizes={},
    sample_axis=2,
    sample_pattern="in_channels",
    packing=2,
)
def _ideogram4(d: Dummy) -> dict[str, Any]:
    side = d.packing(d.config.in_channels)
    image = _channel_fastest(pack(d.latent, side), side)
    text, device = d.text_tokens, d.latent.device
    length = text + image.shape[1]
    positions = torch.cat([d.zeros(text, 3), d.positions(side)])
    indicator = torch.full((d.batch, length), 2, device=device)  # 2 is image, 3 is text
    indicator[:, :text] = 3
    return {
        "hidden_states": torch.nn.functional.pad(image, (0, 0, text, 0)),
        "timestep": d.time(),
        "encoder_hidden_states": d.normal(length, d.config.llm_features_dim),
        "position_ids": positions.long().expand(d.batch, -1, -1),
        "segment_ids": torch.ones(d.batch, length, dtype=torch.int64, device=device),
        "indicator": indicator,
    }


def _channel_fastest(tokens: torch.Tensor, side: int) -> torch.Tensor:
    return tokens.unflatten(2, (-1, side * side)).transpose(2, 3).flatten(2)


@dummy
def _joy_image(d: Dummy) -> dict[str, Any]:
    return {
        "hidden_states": d.latent[:, :, None],  # one frame
        "timestep": d.time(1000),
        "encoder_hidden_states": d.text(d.config.text_dim),
    }


@dummy
def _joy_image_plus(d: Dummy) -> dict[str, Any]:
    side = d.config.patch_size[-1]
    rows, columns = d.grid(side)
    patches = pack(d.latent, side).unflatten(2, (-1, 1, side, side))  # [B, n, C, 1, p, p]
    return {
        "hidden_states": patches,
        "timestep": d.time(1000),
        "encoder_hidden_states": d.text(d.config.text_dim),
        "shape_list": [[(1, rows, columns)]] * d.batch,
    }


def _joy_image_places(transformer: ModelMixin) -> ChannelDescription:
    frames, side, _ = transformer.config.patch_size
    return ChannelDescription(
        inputs=input_layer("img_in"),
        outputs=output_layer("proj_out", "t p p c"),
        sizes={"p": side, "t": frames},
        dummy_inputs=_joy_image,
    )


def _joy_image_plus_places(transformer: ModelMixin) -> ChannelDescription:
    return replace(_joy_image_places(transformer), sample_axis=2, dummy_inputs=_joy_image_plus)


describe("JoyImageEditTransformer3DModel", _joy_image_places)
describe("JoyImageEditPlusTransformer3DModel", _joy_image_plus_places)


@dummy
def _kandinsky5(d: Dummy) -> dict[str, Any]:
    rows, columns = d.grid(d.config.patch_size[-1])
    device = d.latent.device
    parts = d.concatenated(2 if d.config.visual_cond else 1)
    if d.config.visual_cond:  # the conditioning latent, and a mask of where it applies
        parts.append(torch.ones_like(d.latent[:, :1]))
    return {
        "hidden_states": torch.cat(parts, dim=1).permute(0, 2, 3, 1)[:, None].contiguous(),  # [B, 1, h, w, C]
        "encoder_hidden_states": d.text(d.config.in_text_dim),
        "timestep": d.time(1000),
        "pooled_projections": d.normal(d.config.in_text_dim2),
        "visual_rope_pos": [torch.arange(n, device=device) for n in (1, rows, columns)],
        "text_rope_pos": torch.arange(d.text_tokens, device=device),
    }


def _kandinsky5_places(transformer: ModelMixin) -> ChannelDescription:
    frames, side, _ = transformer.config.patch_size
    latent = "t p p ( c | c | 1 )" if transformer.config.visual_cond else "t p p c"
    return ChannelDescription(
        inputs=input_layer("visual_embeddings.in_layer", latent),
        outputs=output_layer("out_layer.out_layer", "c t p p"),
        counts={"in_visual_dim": "c", "out_visual_dim": "c"},
        sizes={"p": side, "t": frames},
        sample_axis=4,
        dummy_inputs=_kandinsky5,
    )


describe("Kandinsky5Transformer3DModel", _kandinsky5_places)
