"""Classes from before flow matching, whose heads may also predict variances."""

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed, get_2d_rotary_pos_embed_lumina
from diffusers.models.modeling_utils import ModelMixin

from davae.errors import WarmStartError
from davae.warm_start.description import ChannelDescription, ChannelPlace, DummyInputs, input_layer, output_layer
from davae.warm_start.dummy_inputs import Dummy, dummy
from davae.warm_start.registry import Describer, describe


def _patches(inputs: DummyInputs, head: str = "proj_out", **more: Any) -> ChannelDescription:
    """A patch convolution as input, patches as output, with variances if ``out_channels`` counts them."""
    return ChannelDescription(
        inputs=input_layer("pos_embed.proj"),
        outputs=output_layer(head, "p p out_channels"),
        counts={"in_channels": "c", "out_channels": ("2 c", "c")},
        sample_pattern="out_channels",
        dummy_inputs=inputs,
        **more,
    )


def _learned_variance(inputs: DummyInputs, patches: tuple[ChannelPlace, ...], head: str) -> Describer:
    """Patches as output, with variances if the configuration has ``learn_sigma``."""

    def description(transformer: ModelMixin) -> ChannelDescription:
        variance = "2 c" if transformer.config.learn_sigma else "c"
        return ChannelDescription(
            inputs=patches,
            outputs=output_layer(head, f"p p {variance}"),
            counts={"in_channels": "c"},
            sample_pattern=variance,
            dummy_inputs=inputs,
        )

    return description


@dummy
def _dit(d: Dummy) -> dict[str, Any]:
    steps = d.config.num_embeds_ada_norm
    return {
        "hidden_states": d.latent,
        "timestep": d.integers(steps),
        "class_labels": d.integers(steps + 1),  # the last one is "no class"
    }


# The class supports square images only.
describe("DiTTransformer2DModel", _patches(_dit, "proj_out_2", tokens=(4, 4)))


def _pixart_conditions(d: Dummy) -> dict[str, Any]:
    sizes = torch.full((d.batch, 2), 512.0, device=d.latent.device)
    return {"resolution": sizes, "aspect_ratio": torch.ones(d.batch, 1, device=d.latent.device)}


@dummy
def _pixart(d: Dummy) -> dict[str, Any]:
    inner = d.config.num_attention_heads * d.config.attention_head_dim
    conditions = _pixart_conditions(d) if d.transformer.use_additional_conditions else {}
    return {
        "hidden_states": d.latent,
        "encoder_hidden_states": d.text(d.config.caption_channels or d.config.cross_attention_dim or inner),
        "encoder_attention_mask": d.text_mask(torch.int64),
        "timestep": d.integers(1000),
        "added_cond_kwargs": conditions or {"resolution": None, "aspect_ratio": None},
    }


describe("PixArtTransformer2DModel", _patches(_pixart))


def _legacy_places(transformer: ModelMixin) -> ChannelDescription:
    # The former class of DiT and PixArt; diffusers loads saved models of it as one of theirs.
    config = transformer.config
    if config.patch_size is None:
        raise WarmStartError(
            "Transformer2DModel without patches is a block of a U-Net: its layer norm (a group norm over its "
            "input) would mix base and detail channels"
        )
    if config.norm_type == "ada_norm_single":
        return _patches(_pixart, tokens=(4, 4))
    return _patches(_dit, "proj_out_2", tokens=(4, 4))


describe("Transformer2DModel", _legacy_places)


@dummy
def _lumina_next(d: Dummy) -> dict[str, Any]:
    head = d.config.hidden_size // d.config.num_attention_heads
    return {
        "hidden_states": d.latent,
        "encoder_hidden_states": d.text(d.config.cross_attention_dim),
        "encoder_mask": d.text_mask(torch.int64),
        "timestep": d.time(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(head, 384, 384),
        "cross_attention_kwargs": {},
    }


describe(
    "LuminaNextDiT2DModel",
    _learned_variance(_lumina_next, input_layer("patch_embedder.proj", "c p p"), "norm_out.linear_2"),
)


@dummy
def _hunyuan_dit(d: Dummy) -> dict[str, Any]:
    config, device = d.config, d.latent.device
    head = config.hidden_size // config.num_attention_heads
    rows, columns = d.grid(config.patch_size)
    # The forward adds one learned padding row for each text position, so these lengths are fixed.
    clip, t5 = config.text_len, config.text_len_t5
    return {
        "hidden_states": d.latent,
        "timestep": d.time(1000).to(d.latent.dtype),
        "encoder_hidden_states": d.normal(clip, config.cross_attention_dim),
        "text_embedding_mask": torch.ones(d.batch, clip, dtype=torch.int64, device=device),
        "encoder_hidden_states_t5": d.normal(t5, config.cross_attention_dim_t5),
        "text_embedding_mask_t5": torch.ones(d.batch, t5, dtype=torch.int64, device=device),
        "image_meta_size": torch.full((d.batch, 6), 512.0, device=device),
        "style": torch.zeros(d.batch, dtype=torch.int64, device=device),
        "image_rotary_emb": get_2d_rotary_pos_embed(
            head, ((0, 0), (rows, columns)), (rows, columns), device=device, output_type="pt"
        ),
    }


describe("HunyuanDiT2DModel", _learned_variance(_hunyuan_dit, input_layer("pos_embed.proj"), "proj_out"))
