"""Small parts to build pipelines from."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from tests.models.bases import make_base
from transformers import Qwen3VLConfig, Qwen3VLModel

from davae.bases import debug_text
from davae.bases.debug_pipelines import small_pipeline
from davae.bases.debug_transformers import small_transformer
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.class_conditional import ClassConditionalPipeline
from davae.warm_start import channel_parameters

NAMES = {0: "brick wall", 1: "meadow", 2: "Lake"}


def small_vae(channels: int = 4) -> AutoencoderKL:
    """An f2 autoencoder with random weights."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.25,
        layers_per_block=1,
    ).eval()


def pipeline_around(transformer: ModelMixin, **parts: Any) -> ClassConditionalPipeline:
    """A pipeline with this transformer and small parts besides."""
    defaults = {
        "vae": small_vae(transformer.config.in_channels),
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "id2label": NAMES,
    }
    pipeline = ClassConditionalPipeline(transformer=transformer, **{**defaults, **parts})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def upgraded(base: DiffusionPipeline, *, detail_channels: int = 4, seed: int = 0) -> DiffusionPipeline:
    """The upgrade by 2, as if it had been tuned: the detail channels take part."""
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=detail_channels)
    pipe = upgrade_pipeline(base, vae)
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(pipe.transformer.named_parameters())
    for name in channel_parameters(pipe.transformer):
        values = parameters[name].data
        values += 0.02 * torch.randn(values.shape, generator=generator)
    pipe.set_progress_bar_config(disable=True)
    return pipe


CHAT = (  # contents are texts, or lists of parts
    "{% for m in messages %}<|im_start|>"
    "{{ m['content'] if m['content'] is string else m['content'][0]['text'] }}<|im_end|>{% endfor %}"
)


def ideogram4() -> diffusers.Ideogram4Pipeline:
    """A small Ideogram 4, whole: 36 layers of a language model with a width of 16, of which the class reads 13."""
    torch.manual_seed(0)
    vae = make_base("flux2").eval()
    vae.bn.running_mean.copy_(torch.randn(16))
    vae.bn.running_var.copy_(torch.rand(16) + 0.5)
    tokenizer = debug_text.qwen()["tokenizer"]
    tokenizer.chat_template = CHAT
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 36, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 1, "head_dim": 12, "vocab_size": len(tokenizer)}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 16}
    vision["deepstack_visual_indexes"] = []
    kind, width = "Ideogram4Transformer2DModel", 13 * text["hidden_size"]
    pipe = diffusers.Ideogram4Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)).eval(),
        tokenizer=tokenizer,
        transformer=small_transformer(kind, llm_features_dim=width),
        unconditional_transformer=small_transformer(kind, seed=1, llm_features_dim=width),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without_encoders(name: str) -> tuple[Any, dict[str, Any]]:
    """A small pipeline that takes embeddings, and what its call takes: Flux2 (klein), Krea2, Chroma or ZImage.

    Ideogram4 takes none: it has its encoders and a prompt.
    """
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    call: dict[str, Any] = {"height": 64, "width": 96, "num_inference_steps": 2, "output_type": "pt"}
    if name == "Ideogram4":
        call |= {"prompt": ["a fox"], "max_sequence_length": 24, "guidance_scale": 1.0, "guidance_schedule": None}
        return ideogram4(), call
    if name == "Flux2":
        vae = make_base("flux2")
        vae.bn.running_mean.copy_(torch.randn(16))
        vae.bn.running_var.copy_(torch.rand(16) + 0.5)
        transformer = small_transformer("Flux2Transformer2DModel")
        pipe = diffusers.Flux2KleinPipeline(scheduler, vae, None, None, transformer, is_distilled=True)
        call["prompt_embeds"] = torch.randn(1, 3, transformer.config.joint_attention_dim)
    elif name == "Chroma":
        transformer = small_transformer("ChromaTransformer2DModel")
        pipe = diffusers.ChromaPipeline(scheduler, small_pipeline("flux").vae, None, None, transformer)
        call |= {"prompt_embeds": torch.randn(1, 3, transformer.config.joint_attention_dim), "guidance_scale": 1.0}
        call["prompt_attention_mask"] = torch.tensor([[1.0, 1.0, 0.0]])
    elif name == "Krea2":
        transformer = small_transformer("Krea2Transformer2DModel")
        pipe = diffusers.Krea2Pipeline(scheduler, small_pipeline("qwenimage").vae, None, None, transformer)
        sizes = transformer.config.num_text_layers, transformer.config.text_hidden_dim
        call |= {"prompt_embeds": torch.randn(1, 3, *sizes), "guidance_scale": 0.0}
        call["prompt_embeds_mask"] = torch.tensor([[True, True, False]])
    else:
        transformer = small_transformer("ZImageTransformer2DModel")
        pipe = diffusers.ZImagePipeline(scheduler, small_pipeline("flux").vae, None, None, transformer)
        call |= {"prompt_embeds": [torch.randn(3, transformer.config.cap_feat_dim)], "guidance_scale": 0.0}
    pipe.set_progress_bar_config(disable=True)
    return pipe, call
