"""Small pipelines of real diffusers classes with random weights, built in code.

They behave like the published ones (the same calls, schedulers, packing, guidance and text encoding) and are used for
tests, trying recipes, and bug reports. Their images are noise.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLQwenImage,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from davae.bases import debug_text as text
from davae.errors import DavaeError

CHANNELS = 4  # of every base latent
_FLUX_SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}


def small_pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """A pipeline with random weights, in eval mode, without a progress bar; the same at every call.

    Args:
        name: one of `SMALL_PIPELINES`.
        seed: of the weights; torch's own random state is not changed.

    Raises:
        DavaeError: an unknown name.
    """
    if name not in _SMALL:
        raise DavaeError(f"there is no small pipeline '{name}': choose one of {', '.join(SMALL_PIPELINES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _SMALL[name].make()
    pipe.transformer.eval()
    pipe.vae.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_arguments(name: str, *, scale: int = 1, prompt: str = "a red fox in snow") -> dict[str, Any]:
    """Arguments for a quick call of the pipeline: two steps at its base resolution, guidance as by default.

    The output is a tensor [1, 3, H, W] in [0, 1].

    Args:
        name: one of `SMALL_PIPELINES`.
        scale: `s` of an upgraded pipeline, whose sizes are s times as large.
        prompt: the prompt; for class-conditional pipelines its length chooses the class.
    """
    small = _SMALL[name]
    arguments = {"num_inference_steps": 2, "output_type": "pt", **small.call}
    if small.of_classes:
        return arguments | {"class_labels": [len(prompt)]}  # its size cannot be chosen
    return arguments | {"prompt": prompt, "height": scale * small.side, "width": scale * small.side}


def base_resolution(name: str) -> int:
    """Side in pixels of the image that :func:`call_arguments` asks a base pipeline for."""
    return _SMALL[name].side


@torch.no_grad()
def _louder(part: nn.Module, factor: float = 2.0) -> None:
    """Scale up the weights: with torch's own, the output would hardly depend on prompt or latent."""
    for module in part.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            module.weight *= factor


def _kl(levels: int = 3, **further: Any) -> AutoencoderKL:
    """Compression 4 with three levels, 8 with four."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=4,
        sample_size=32,
        force_upcast=False,
        **{"scaling_factor": 1.5, **further},
    )


def _kl_16_channels_style(levels: int = 3) -> AutoencoderKL:
    """Like those of SD3 and FLUX: with a shift, without quant convolutions."""
    return _kl(levels, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False)


def _transformer(kind: type[ModelMixin], **further: Any) -> ModelMixin:
    """Two layers, two heads and 2 x 2 patches, as far as the class has such options."""
    sizes = {"patch_size": 2, "in_channels": CHANNELS, "num_layers": 2, "attention_head_dim": 8}
    sizes |= {"num_attention_heads": 2, "joint_attention_dim": text.WIDTH, "sample_size": 8}
    known = inspect.signature(kind).parameters
    return kind(**{name: size for name, size in sizes.items() if name in known} | further)


def _sd3() -> DiffusionPipeline:
    transformer = _transformer(
        SD3Transformer2DModel,
        out_channels=CHANNELS,
        caption_projection_dim=16,
        pooled_projection_dim=2 * text.CLIP_WIDTH,
        pos_embed_max_size=32,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_kl_16_channels_style(),
        **text.clip(projection=True),
        **text.clip("_2", projection=True),
        **text.t5("_3"),
    )


def _flux() -> DiffusionPipeline:
    transformer = _transformer(
        FluxTransformer2DModel,
        patch_size=1,
        in_channels=4 * CHANNELS,  # latents packed two by two
        num_layers=1,
        num_single_layers=1,
        pooled_projection_dim=text.CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**_FLUX_SHIFT),
        vae=_kl_16_channels_style(),
        **text.clip(projection=False),
        **text.t5("_2"),
        transformer=transformer,
    )


def _pixart_sigma() -> DiffusionPipeline:
    transformer = _transformer(
        PixArtTransformer2DModel,
        out_channels=2 * CHANNELS,  # noise and variance
        cross_attention_dim=16,
        sample_size=32,
        caption_channels=text.WIDTH,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(
        **text.t5(), vae=_kl(4), transformer=transformer, scheduler=DPMSolverMultistepScheduler()
    )


def _sana() -> DiffusionPipeline:
    levels = 6
    coders = {
        "block_types": ("ResBlock",) * (levels - 1) + ("EfficientViTBlock",),
        "block_out_channels": (8,) * levels,
        "layers_per_block": (1,) * levels,
        "qkv_multiscales": ((),) * (levels - 1) + ((5,),),
    }
    vae = AutoencoderDC(
        latent_channels=CHANNELS,
        attention_head_dim=8,
        **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in coders.items()},
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    transformer = _transformer(
        SanaTransformer2DModel,
        out_channels=CHANNELS,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=text.WIDTH,
        sample_size=32,
        patch_size=1,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return SanaPipeline(**text.gemma(), vae=vae, transformer=transformer, scheduler=scheduler)


def _dit() -> DiffusionPipeline:
    transformer = _transformer(
        DiTTransformer2DModel,
        out_channels=2 * CHANNELS,  # noise and variance
        norm_num_groups=4,
        num_embeds_ada_norm=1000,  # the pipeline writes "no class" as 1000
    )
    return DiTPipeline(
        transformer=transformer,
        vae=_kl(),
        scheduler=DDIMScheduler(clip_sample=False),
        id2label={number: f"class {number}" for number in range(1000)},
    )


def _qwenimage() -> DiffusionPipeline:
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[-0.3, 0.1, 0.2, 0.4],
        latents_std=[1.5, 0.8, 1.1, 2.0],
    )
    _louder(vae)
    transformer = _transformer(
        QwenImageTransformer2DModel,
        in_channels=4 * CHANNELS,  # latents packed two by two
        out_channels=CHANNELS,
        axes_dims_rope=(2, 2, 4),
    )
    _louder(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(scheduler=scheduler, vae=vae, **text.qwen(), transformer=transformer)


def _lumina2() -> DiffusionPipeline:
    transformer = _transformer(
        Lumina2Transformer2DModel,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 64, 64),
        cap_feat_dim=text.WIDTH,
    )
    return Lumina2Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=_kl_16_channels_style(levels=4),  # the pipeline assumes 8 pixels per latent position
        **text.gemma(),
    )


def _auraflow() -> DiffusionPipeline:
    transformer = _transformer(
        AuraFlowTransformer2DModel,
        out_channels=CHANNELS,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        caption_projection_dim=16,
        pos_embed_max_size=1024,
    )
    _louder(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return AuraFlowPipeline(**text.umt5(), vae=_kl(), transformer=transformer, scheduler=scheduler)


@dataclass(frozen=True)
class _Small:
    make: Callable[[], DiffusionPipeline]
    side: int = 32  # pixels of its images
    of_classes: bool = False
    call: dict[str, Any] = field(default_factory=dict)  # further arguments of a quick call


# The lists of sizes begin at 256 pixels; cleaning asks for further packages.
_AS_ASKED = {"use_resolution_binning": False, "clean_caption": False}
_SMALL = {
    "sd3": _Small(_sd3),
    "flux": _Small(_flux),
    "pixart-sigma": _Small(_pixart_sigma, call=_AS_ASKED),
    "sana": _Small(_sana, side=64, call=_AS_ASKED),
    "dit": _Small(_dit, of_classes=True),
    "qwenimage": _Small(_qwenimage),
    "lumina2": _Small(_lumina2, side=64),
    "auraflow": _Small(_auraflow),
}
SMALL_PIPELINES = tuple(_SMALL)
