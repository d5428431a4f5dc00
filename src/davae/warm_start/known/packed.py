"""Classes whose pipelines pack the latent two by two into tokens, channel slowest, before the forward."""

from typing import Any

import torch

from davae.warm_start.description import ChannelDescription, DummyInputs, input_layer, output_layer
from davae.warm_start.dummy_inputs import Dummy, dummy, pack
from davae.warm_start.registry import describe, described

#: Ways to count the latent: unpacked, packed two by two, packed and concatenated with a control latent.
PACKED = ("c", "c 2 2", "c 2 2 | c 2 2")


def side_of(d: Dummy) -> tuple[int, int]:
    """Side of the packed squares, and how many latents are concatenated on the feature axis."""
    features = d.config.in_channels
    out = d.config.get("out_channels") or features
    channels = d.latent.shape[1]
    side = d.packing(min(out, features))
    if side == 1 and features > channels:  # the head counts unpacked channels
        side = 2
    return side, max(1, features // (channels * side * side))


def _image(d: Dummy, axes: int = 3) -> dict[str, Any]:
    side, latents = side_of(d)
    return {
        "hidden_states": d.packed(side, latents=latents),
        "img_ids": d.positions(side, axes),
        "txt_ids": d.zeros(d.text_tokens, axes),
    }


@described(
    "FluxTransformer2DModel",
    inputs=input_layer("x_embedder", "in_channels"),
    outputs=output_layer("proj_out", "p p out_channels"),
    counts={"in_channels": PACKED, "out_channels": PACKED[:2]},
    sample_axis=2,
    sample_pattern="p p out_channels",
    packing=2,
)
def _flux(d: Dummy) -> dict[str, Any]:
    return {
        **_image(d),
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "pooled_projections": d.normal(d.config.pooled_projection_dim),
        "timestep": d.time(),
        "guidance": d.guidance(),
    }


_QWEN: dict[str, Any] = {
    "inputs": input_layer("img_in", "in_channels"),
    "outputs": output_layer("proj_out", "out_channels p p"),  # unpacked by the pipeline as "c 2 2"
    "counts": {"in_channels": PACKED[:2], "out_channels": "c"},
    "sample_axis": 2,
    "sample_pattern": "out_channels p p",
}


@described("QwenImageTransformer2DModel", **_QWEN)
def _qwen_image(d: Dummy) -> dict[str, Any]:
    side, latents = side_of(d)
    shape = (1, *d.grid(side))
    return {
        "hidden_states": d.packed(side, latents=latents),
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "encoder_hidden_states_mask": None if d.latent.is_meta else d.text_mask(),
        "timestep": d.time(),
        "img_shapes": [[shape]] * d.batch,
        "guidance": d.guidance(),
        "additional_t_cond": d.integers(2) if d.config.get("use_additional_t_cond") else None,
    }


@described("NucleusMoEImageTransformer2DModel", **_QWEN)
def _nucleus(d: Dummy) -> dict[str, Any]:
    side, _ = side_of(d)
    return {
        "hidden_states": d.packed(side),
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "encoder_hidden_states_mask": None if d.latent.is_meta else d.text_mask(),
        "timestep": d.time(),
        "img_shapes": [(1, *d.grid(side))] * d.batch,
    }


@dummy
def _flux2(d: Dummy) -> dict[str, Any]:
    return {
        **_image(d, axes=4),
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "timestep": d.time(),
        "guidance": d.guidance(),
    }


@dummy
def _chroma(d: Dummy) -> dict[str, Any]:
    return {**_image(d), "encoder_hidden_states": d.text(d.config.joint_attention_dim), "timestep": d.time()}


@dummy
def _bria_fibo(d: Dummy) -> dict[str, Any]:
    config = d.config
    layers = d.normal(config.num_layers + config.num_single_layers, d.text_tokens, config.text_encoder_dim)
    return {
        **_image(d),
        "encoder_hidden_states": d.text(config.joint_attention_dim),
        "text_encoder_layers": list(layers.unbind(1)),
        "timestep": d.time(1000),
        "guidance": d.guidance(),
    }


def _tokens(
    inputs: DummyInputs, *keys: str, embedder: str = "x_embedder", head: str = "proj_out"
) -> ChannelDescription:
    """The description of a class with linear layers over packed features as input and output."""
    out = "out_channels" if "out_channels" in keys else "in_channels"
    return ChannelDescription(
        inputs=input_layer(embedder, "in_channels"),
        outputs=output_layer(head, out),
        counts=dict.fromkeys(("in_channels", *keys), PACKED[:2]),
        sizes={},
        sample_axis=2,
        sample_pattern=out,
        packing=2,
        dummy_inputs=inputs,
    )


describe("Flux2Transformer2DModel", _tokens(_flux2, "out_channels"))
describe("ChromaTransformer2DModel", _tokens(_chroma, "out_channels"))
describe("OvisImageTransformer2DModel", _tokens(_chroma, "out_channels"))
describe("LongCatImageTransformer2DModel", _tokens(_chroma))
describe("BriaTransformer2DModel", _tokens(_chroma))
describe("BriaFiboTransformer2DModel", _tokens(_bria_fibo))


@described(
    "Flux3Transformer2DModel",
    inputs=(
        *input_layer("x_embedders.image", "in_channels"),
        *input_layer("x_embedders.image_cond", "cond_in_channels"),
    ),
    outputs=output_layer("proj_out", "in_channels"),
    counts={"in_channels": PACKED[:2], "cond_in_channels": PACKED[:2]},
    sizes={},
    sample_axis=2,
    sample_pattern="in_channels",
    packing=2,
)
def _flux3(d: Dummy) -> dict[str, Any]:
    image = _image(d, axes=4)
    side, _ = side_of(d)
    condition = pack(d.concatenated(2)[1], side)  # a clean image, as tokens of its own
    return {
        **image,
        "image_cond_hidden_states": condition,
        "image_cond_ids": image["img_ids"],
        "encoder_hidden_states": d.text(d.config.joint_attention_dim),
        "timestep": d.time(),
        "target_timestep": d.time() if d.config.flow_map else None,
    }


@dummy
def _krea2(d: Dummy) -> dict[str, Any]:
    side, _ = side_of(d)
    return {
        "hidden_states": d.packed(side),
        "encoder_hidden_states": d.normal(d.text_tokens, d.config.num_text_layers, d.config.text_hidden_dim),
        "timestep": d.time(),
        "position_ids": torch.cat([d.zeros(d.text_tokens, 3), d.positions(side)]),
    }


describe("Krea2Transformer2DModel", _tokens(_krea2, embedder="img_in", head="final_layer.linear"))
