"""A small random instance of every image transformer class that diffusers ships.

Sizes differ from each other where the class lets them, so that no axis can be taken for another, and no weight
is zero: a head of zeros would agree with everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

_MMDIT: dict[str, Any] = {  # the FLUX kind: latents packed two by two
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 3,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4),
}

_JOY_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "text_dim": 24,
    "mlp_width_ratio": 2.0,
    "num_layers": 1,
    "rope_dim_list": (4, 4, 4),
}

#: Arguments of the constructors, by class.
_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "SD3Transformer2DModel": {
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "joint_attention_dim": 24,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 20,
        "pos_embed_max_size": 12,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
    },
    "FluxTransformer2DModel": {**_MMDIT, "pooled_projection_dim": 20, "guidance_embeds": True},
    "Flux2Transformer2DModel": {**_MMDIT, "timestep_guidance_channels": 20, "axes_dims_rope": (2, 2, 4, 4)},
    "Flux3Transformer2DModel": {
        **_MMDIT,
        "cond_in_channels": 16,
        "timestep_channels": 20,
        "axes_dims_rope": (2, 2, 4, 4),
    },
    "ChromaTransformer2DModel": {
        **_MMDIT,
        "approximator_num_channels": 16,
        "approximator_hidden_dim": 20,
        "approximator_layers": 1,
    },
    "OvisImageTransformer2DModel": {**_MMDIT, "out_channels": 16},
    "LongCatImageTransformer2DModel": {**_MMDIT, "pooled_projection_dim": 20},
    "BriaTransformer2DModel": {**_MMDIT},
    "BriaFiboTransformer2DModel": {**_MMDIT, "joint_attention_dim": 24, "text_encoder_dim": 20},
    "PixArtTransformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "cross_attention_dim": 36,
        "caption_channels": 24,
    },
    "SanaTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 4,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 32,
        "caption_channels": 24,
        "patch_size": 1,
    },
    "DiTTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4),
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 36,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "axes_dim_rope": (4, 4, 4),
        "axes_lens": (64, 32, 32),
        "cap_feat_dim": 24,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "caption_projection_dim": 36,
        "out_channels": 4,
        "pos_embed_max_size": 64,
    },
    "Transformer2DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "sample_size": 8,
        "patch_size": 2,
        "norm_type": "ada_norm_zero",
        "num_embeds_ada_norm": 10,
        "attention_bias": True,
        "norm_elementwise_affine": False,
        "activation_fn": "gelu-approximate",
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "hidden_size": 36,
        "num_layers": 1,
        "num_attention_heads": 3,
        "num_kv_heads": 1,
        "multiple_of": 8,
        "cross_attention_dim": 24,
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 3,
        "attention_head_dim": 12,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 8,
        "hidden_size": 36,
        "num_layers": 4,
        "mlp_ratio": 2.0,
        "cross_attention_dim": 20,
        "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 28,
        "text_len": 5,
        "text_len_t5": 6,
    },
    "PRXTransformer2DModel": {
        "in_channels": 4,
        "context_in_dim": 24,
        "hidden_size": 36,
        "mlp_ratio": 2.0,
        "num_heads": 3,
        "depth": 1,
        "axes_dim": (6, 6),
        "bottleneck_size": 20,
        "resolution_embeds": True,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 36,
        "num_attention_heads": 3,
        "num_layers": 1,
        "ffn_hidden_size": 20,
        "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": 24,
        "rope_axes_dim": (4, 4, 4),
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2,
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "caption_channels": (24, 20),
        "text_emb_dim": 28,
        "axes_dims_rope": (4, 4, 4),
        "max_resolution": (16, 16),
        "llama_layers": (0, 1),
    },
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "patch_size": (2, 2),
        "text_embed_dim": 24,
        "rope_axes_dim": (6, 6),
    },
    "CogView3PlusTransformer2DModel": {
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "out_channels": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 20,
        "condition_dim": 8,
        "pos_embed_max_size": 16,
        "sample_size": 8,
    },
    "CogView4Transformer2DModel": {
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "out_channels": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 20,
        "condition_dim": 8,
        "pos_embed_max_size": 16,
        "sample_size": 8,
        "rope_axes_dim": (16, 16),
    },
    "GlmImageTransformer2DModel": {
        "in_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "out_channels": 4,
        "text_embed_dim": 24,
        "time_embed_dim": 20,
        "condition_dim": 8,
        "prior_vq_quantizer_codebook_size": 30,
    },
    "NucleusMoEImageTransformer2DModel": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 3,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4),
        "mlp_ratio": 6.0,  # its width is rounded down to a multiple of 128
        "dense_moe_strategy": "leave_first_block_dense",
        "num_experts": 3,
        "moe_intermediate_dim": 20,
        "capacity_factors": 2.0,
    },
    "Krea2Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 20,
        "timestep_embed_dim": 28,
        "text_hidden_dim": 24,
        "num_text_layers": 3,
        "text_num_attention_heads": 4,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 32,
        "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 4, 4),
    },
    "Ideogram4Transformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "adaln_dim": 28,
        "llm_features_dim": 24,
        "mrope_section": (2, 2, 2),
    },
    "QwenImage21Transformer2DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "context_in_dim": 24,
        "mlp_ratio": 2,
        "axes_dims_rope": (4, 4, 4),
    },
    "ZImageTransformer2DModel": {
        "all_patch_size": (2, 4),
        "all_f_patch_size": (1, 1),
        "in_channels": 4,
        "dim": 36,
        "n_layers": 1,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "n_kv_heads": 3,
        "cap_feat_dim": 24,
        "axes_dims": (4, 4, 4),
        "axes_lens": (128, 32, 32),
    },
    "OmniGenTransformer2DModel": {
        "in_channels": 4,
        "hidden_size": 36,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "intermediate_size": 20,
        "num_layers": 1,
        "pad_token_id": 0,
        "vocab_size": 30,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 256,
        "rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6},
        "pos_embed_max_size": 16,
        "time_step_dim": 28,
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4,
        "dim": 36,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 3,
        "cap_feat_dim": 24,
        "injection_layer_ids": (1,),
        "perceiver_num_layers": 1,
        "min_num_gist_tokens": 4,
        "max_num_gist_tokens": 8,
        "gist_step": 2,
        "gist_min_text_len": 4,
        "gist_max_text_len": 32,
        "axes_dims": (4, 4, 4),
        "axes_lens": (64, 32, 32),
    },
    "JoyImageEditTransformer3DModel": {**_JOY_IMAGE},
    "JoyImageEditPlusTransformer3DModel": {**_JOY_IMAGE},
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 4,
        "in_text_dim": 24,
        "in_text_dim2": 20,
        "time_dim": 28,
        "out_visual_dim": 4,
        "model_dim": 36,
        "ff_dim": 40,
        "num_text_blocks": 1,
        "num_visual_blocks": 1,
        "axes_dims": (4, 4, 4),
        "visual_cond": True,
    },
}

#: Classes in diffusers' package of transformers that are no 2D image diffusion transformer, and why.
EXCLUDED_TRANSFORMERS: dict[str, str] = {
    **dict.fromkeys(
        (
            "AllegroTransformer3DModel",
            "AnyFlowFARTransformer3DModel",
            "AnyFlowTransformer3DModel",
            "ChronoEditTransformer3DModel",
            "CogVideoXTransformer3DModel",
            "ConsisIDTransformer3DModel",
            "CosmosTransformer3DModel",
            "EasyAnimateTransformer3DModel",
            "HeliosTransformer3DModel",
            "HunyuanVideo15Transformer3DModel",
            "HunyuanVideoFramepackTransformer3DModel",
            "HunyuanVideoTransformer3DModel",
            "Kandinsky6SRTransformer3DModel",
            "LTXVideoTransformer3DModel",
            "LatteTransformer3DModel",
            "MochiTransformer3DModel",
            "MotifVideoTransformer3DModel",
            "SanaVideoTransformer3DModel",
            "SanaWMLTX2RefinerTransformer3DModel",
            "SanaWMTransformer3DModel",
            "SkyReelsV2Transformer3DModel",
            "WanAnimate2Transformer3DModel",
            "WanAnimateTransformer3DModel",
            "WanTransformer3DModel",
            "WanVACETransformer3DModel",
        ),
        "video: its latents have frames",
    ),
    **dict.fromkeys(
        (
            "Cosmos3OmniTransformer",
            "Kandinsky6Transformer3DModel",
            "LTX2VideoTransformer3DModel",
            "MiniMaxH3Transformer3DModel",
        ),
        "video and audio in one sequence",
    ),
    **dict.fromkeys(
        (
            "AceStepTransformer1DModel",
            "LongCatAudioDiTTransformer",
            "MiniMaxMusic3RVQDepthDecoder",
            "MiniMaxMusic3Transformer1DModel",
            "StableAudio3DiTModel",
            "StableAudioDiTModel",
            "T5FilmDecoder",
        ),
        "audio",
    ),
    "DreamLiteTransformer2DModel": "a block of a U-Net: a group norm over its input mixes the channels",
    "PriorTransformer": "predicts one image embedding: no latent grid",
    "RFD4ProteinaTransformer": "proteins",
    "TransformerTemporalModel": "a block of video U-Nets",
}

#: Channels of the latent in the autoencoder's counting, the same for all.
SMALL_CHANNELS = 4


def small_transformer(class_name: str, *, seed: int = 0, **changes: Any) -> ModelMixin:
    """A small instance with every weight random.

    Args:
        class_name: a key of `SMALL_TRANSFORMERS`.
        seed: of the weights; torch's own random state is left alone.
        changes: configuration to change.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(diffusers, class_name)(**{**_CONFIGURATIONS[class_name], **changes})
    return randomise(model, seed)


def randomise(model: nn.Module, seed: int = 0) -> Any:
    """Every weight random by its fan-in, also those that start at zero. The model itself, in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


def _maker(class_name: str) -> Callable[[], ModelMixin]:
    return lambda: small_transformer(class_name)


#: Class name to a function that makes a small instance.
SMALL_TRANSFORMERS: dict[str, Callable[[], ModelMixin]] = {name: _maker(name) for name in _CONFIGURATIONS}
