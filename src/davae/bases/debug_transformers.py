"""A small random instance of every image transformer class that diffusers ships, and the table of them in docs.

Sizes differ from each other if the class allows it, so that no axis can be mistaken for another, and no weight
is zero, since a check of a zero head would prove nothing.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from davae.latents import LatentLayout
from davae.warm_start import (
    ChannelDescription,
    ChannelPlace,
    WarmStartError,
    check_warm_start,
    description_of,
    probed_description,
    widen_channels,
)

#: Arguments of the constructors; every class gets those that it accepts.
_SIZES: dict[str, Any] = {
    name: size
    for names, size in (
        ("num_layers num_single_layers num_mmdit_layers num_single_dit_layers num_refiner_layers", 1),
        ("n_layers n_refiner_layers depth num_text_blocks num_visual_blocks num_layerwise_text_blocks", 1),
        ("num_refiner_text_blocks perceiver_num_layers approximator_layers num_kv_heads", 1),
        ("num_cross_attention_heads text_num_key_value_heads gist_step", 2),
        ("capacity_factors mlp_width_ratio", 2.0),
        ("num_attention_heads num_heads n_heads n_kv_heads num_experts num_text_layers", 3),
        ("in_channels in_visual_dim out_visual_dim text_num_attention_heads", 4),
        ("min_num_gist_tokens gist_min_text_len", 4),
        ("text_len", 5),
        ("text_len_t5", 6),
        ("sample_size multiple_of condition_dim max_num_gist_tokens", 8),
        ("attention_head_dim", 12),
        ("pos_embed_max_size cond_in_channels approximator_num_channels cross_attention_head_dim", 16),
        ("time_embed_dim timestep_channels timestep_guidance_channels approximator_hidden_dim", 20),
        ("text_encoder_dim in_text_dim2 bottleneck_size ffn_hidden_size intermediate_size", 20),
        ("moe_intermediate_dim", 20),
        ("joint_attention_dim cap_feat_dim cross_attention_dim_t5 context_in_dim text_in_dim", 24),
        ("text_embed_dim text_hidden_dim text_dim in_text_dim llm_features_dim", 24),
        ("text_emb_dim time_dim time_step_dim timestep_embed_dim adaln_dim", 28),
        ("prior_vq_quantizer_codebook_size vocab_size", 30),
        ("caption_projection_dim text_intermediate_size gist_max_text_len", 32),
        ("hidden_size dim model_dim", 36),
        ("ff_dim", 40),
        ("max_position_embeddings original_max_position_embeddings", 256),
        ("axes_dims_rope axes_dim_rope rope_axes_dim axes_dims rope_dim_list", (4, 4, 4)),
        ("axes_dim", (6, 6)),
        ("axes_lens", (64, 32, 32)),
        ("mrope_section", (2, 2, 2)),
        ("max_resolution", (16, 16)),
        ("all_patch_size", (2, 4)),
        ("all_f_patch_size", (1, 1)),
        ("llama_layers", (0, 1)),
        ("dual_attention_layers", (0,)),
        ("injection_layer_ids", (1,)),
        ("pad_token_id", 0),
    )
    for name in names.split()
}

_PACKED = {"in_channels": 16}  # latents packed two by two

#: Further or other arguments of single classes.
_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "sample_size": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {**_PACKED, "pooled_projection_dim": 20, "guidance_embeds": True},
    "Flux2Transformer2DModel": {**_PACKED, "axes_dims_rope": (2, 2, 4, 4)},
    "Flux3Transformer2DModel": {**_PACKED, "axes_dims_rope": (2, 2, 4, 4)},
    "ChromaTransformer2DModel": _PACKED,
    "OvisImageTransformer2DModel": {**_PACKED, "out_channels": 16},
    "LongCatImageTransformer2DModel": {**_PACKED, "pooled_projection_dim": 20},
    "BriaTransformer2DModel": _PACKED,
    "BriaFiboTransformer2DModel": _PACKED,
    "PixArtTransformer2DModel": {"out_channels": 8, "cross_attention_dim": 36, "caption_channels": 24},
    "SanaTransformer2DModel": {
        "sample_size": 32,
        "out_channels": 4,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "patch_size": 1,
    },
    "DiTTransformer2DModel": {"out_channels": 8, "num_embeds_ada_norm": 10},
    "QwenImageTransformer2DModel": {**_PACKED, "out_channels": 4},
    "Lumina2Transformer2DModel": {},
    "AuraFlowTransformer2DModel": {"caption_projection_dim": 36, "out_channels": 4, "pos_embed_max_size": 64},
    "Transformer2DModel": {
        "out_channels": 8,
        "patch_size": 2,
        "norm_type": "ada_norm_zero",
        "num_embeds_ada_norm": 10,
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "activation_fn": "gelu-approximate",
    },
    "LuminaNextDiT2DModel": {"cross_attention_dim": 24},
    "HunyuanDiT2DModel": {
        "patch_size": 2,
        "num_layers": 4,
        "mlp_ratio": 2.0,
        "cross_attention_dim": 20,
        "pooled_projection_dim": 28,
    },
    "PRXTransformer2DModel": {"mlp_ratio": 2.0, "resolution_embeds": True},
    "ErnieImageTransformer2DModel": {**_PACKED, "out_channels": 16},
    "HiDreamImageTransformer2DModel": {"patch_size": 2, "caption_channels": (24, 20)},
    "HunyuanImageTransformer2DModel": {
        "out_channels": 4,
        "mlp_ratio": 2.0,
        "patch_size": (2, 2),
        "rope_axes_dim": (6, 6),
    },
    "CogView3PlusTransformer2DModel": {"out_channels": 4},
    "CogView4Transformer2DModel": {"out_channels": 4, "rope_axes_dim": (16, 16)},
    "GlmImageTransformer2DModel": {"out_channels": 4},
    "NucleusMoEImageTransformer2DModel": {
        **_PACKED,
        "out_channels": 4,
        "num_layers": 3,
        "mlp_ratio": 6.0,  # its width is rounded down to a multiple of 128
        "dense_moe_strategy": "leave_first_block_dense",
    },
    "Krea2Transformer2DModel": {**_PACKED, "num_attention_heads": 4, "num_key_value_heads": 2},
    "Ideogram4Transformer2DModel": _PACKED,
    "QwenImage21Transformer2DModel": {"out_channels": 4, "mlp_ratio": 2},
    "ZImageTransformer2DModel": {"axes_lens": (128, 32, 32)},
    "OmniGenTransformer2DModel": {
        "num_key_value_heads": 1,
        "rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6},
    },
    "BriaFibo2Transformer2DModel": {"n_layers": 2},
    "JoyImageEditTransformer3DModel": {},
    "JoyImageEditPlusTransformer3DModel": {},
    "Kandinsky5Transformer3DModel": {"visual_cond": True},
}

#: Classes in diffusers' package of transformers that are no 2D image diffusion transformer, and why.
EXCLUDED_TRANSFORMERS: dict[str, str] = {
    name: reason
    for reason, names in {
        "video: its latents have frames": (
            "AllegroTransformer3DModel AnyFlowFARTransformer3DModel AnyFlowTransformer3DModel "
            "ChronoEditTransformer3DModel CogVideoXTransformer3DModel ConsisIDTransformer3DModel "
            "CosmosTransformer3DModel EasyAnimateTransformer3DModel HeliosTransformer3DModel "
            "HunyuanVideo15Transformer3DModel HunyuanVideoFramepackTransformer3DModel "
            "HunyuanVideoTransformer3DModel Kandinsky6SRTransformer3DModel LTXVideoTransformer3DModel "
            "LatteTransformer3DModel MochiTransformer3DModel MotifVideoTransformer3DModel "
            "SanaVideoTransformer3DModel SanaWMLTX2RefinerTransformer3DModel SanaWMTransformer3DModel "
            "SkyReelsV2Transformer3DModel WanAnimate2Transformer3DModel WanAnimateTransformer3DModel "
            "WanTransformer3DModel WanVACETransformer3DModel"
        ),
        "video and audio in one sequence": (
            "Cosmos3OmniTransformer Kandinsky6Transformer3DModel LTX2VideoTransformer3DModel "
            "MiniMaxH3Transformer3DModel"
        ),
        "audio": (
            "AceStepTransformer1DModel LongCatAudioDiTTransformer MiniMaxMusic3RVQDepthDecoder "
            "MiniMaxMusic3Transformer1DModel StableAudio3DiTModel StableAudioDiTModel T5FilmDecoder"
        ),
        "a block of a U-Net: a group norm over its input mixes the channels": "DreamLiteTransformer2DModel",
        "predicts one image embedding: no latent grid": "PriorTransformer",
        "proteins": "RFD4ProteinaTransformer",
        "a block of video U-Nets": "TransformerTemporalModel",
    }.items()
    for name in names.split()
}

#: Channels of the latent in the autoencoder's counting, the same for all.
SMALL_CHANNELS = 4


def small_transformer(class_name: str, *, seed: int = 0, **changes: Any) -> ModelMixin:
    """A small instance with all weights random.

    Args:
        class_name: a key of `SMALL_TRANSFORMERS`.
        seed: of the weights; torch's own random state is not changed.
        changes: configuration to change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        constructor = getattr(diffusers, class_name)
        sizes = {name: _SIZES[name] for name in inspect.signature(constructor).parameters if name in _SIZES}
        model = constructor(**sizes | _CONFIGURATIONS[class_name] | changes)
    return randomise(model, seed)


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Draw all weights at random by fan-in, also those that start at zero; returns the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


#: Class name to a function that makes a small instance.
SMALL_TRANSFORMERS: dict[str, Callable[[], ModelMixin]] = {
    name: partial(small_transformer, name) for name in _CONFIGURATIONS
}


_LAYOUT = LatentLayout(SMALL_CHANNELS, 6)


def transformer_table() -> str:
    """Markdown: every image transformer class of the installed diffusers, widened on the spot, then the others.

    "Verified difference" is the largest difference of base outputs after widening, relative to the largest
    output, with the channel layers' weights random and details of up to 100 standard deviations; detail outputs
    are exactly zero, or the row would not be there.
    """
    lines = ["| class | resolved | input layers | output layers | verified difference |", "|---|---|---|---|---|"]
    lines += [transformer_row(name) for name in sorted(SMALL_TRANSFORMERS)]
    lines += ["", "| not widened | because |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(EXCLUDED_TRANSFORMERS.items())]
    return "\n".join(lines)


def transformer_row(name: str) -> str:
    """One line of the table: a class of `SMALL_TRANSFORMERS`, widened and checked.

    Raises:
        WarmStartError: it does not start as the original.
    """
    model = SMALL_TRANSFORMERS[name]()
    widened = widen_channels(model, base_channels=_LAYOUT.base_channels, detail_channels=_LAYOUT.detail_channels)
    report = check_warm_start(model, widened, _LAYOUT)
    difference = max(report.max_base_difference, report.max_base_difference_random)
    description = description_of(model).fitted(model, _LAYOUT.base_channels)
    resolved: str = description.source
    if resolved == "described" and _probing_agrees(model, description):
        resolved = "described, probed alike"
    shown = f"{difference:.0e}" if difference else "0"
    return f"| `{name}` | {resolved} | {_places(description.inputs)} | {_places(description.outputs)} | {shown} |"


def _places(places: Sequence[ChannelPlace]) -> str:
    """``layer`` (pattern), each layer once."""
    layers = {place.layer: place.pattern.replace("|", "\\|") for place in places}
    return ", ".join(f"`{layer}` ({pattern})" for layer, pattern in layers.items())


def _probing_agrees(model: ModelMixin, described: ChannelDescription) -> bool:
    """Whether probing alone finds the same entries of the same parameters."""
    try:
        probed = probed_description(model).fitted(model, _LAYOUT.base_channels)
    except WarmStartError:
        return False
    mine, other = (_new_entries(model, description) for description in (described, probed))
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def _new_entries(model: ModelMixin, description: ChannelDescription) -> dict[str, torch.Tensor]:
    sizes, parameters = description.resolve_sizes(model), dict(model.named_parameters())
    return {
        place.parameter: place.widen(torch.ones_like(parameters[place.parameter]), sizes, _LAYOUT) == 0
        for place in description.places
        if place.parameter in parameters
    }
