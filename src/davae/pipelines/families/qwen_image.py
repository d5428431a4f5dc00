"""Qwen-Image and Krea 2: a language model's states with a mask, packed latents, channels normalised separately."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.pipelines.families.family import (
    Conditioning,
    PipelineFamily,
    embedded_guidance,
    pack,
    register_family,
    unpack,
)
from davae.pipelines.families.flux import token_positions


class QwenImage(PipelineFamily):
    """Text embeddings are padded and masked here, because the pipeline pads only to the longest of a batch."""

    pipelines = ("QwenImagePipeline", "QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline")
    text_length = 512
    longest_text = 1024
    packed = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        embeds, mask = pipe.encode_prompt(prompts, device=pipe.text_encoder.device, max_sequence_length=length)
        if mask is None:  # the pipeline returns None if there is no padding
            mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        missing = length - embeds.shape[1]
        return {"prompt_embeds": F.pad(embeds, (0, 0, 0, missing)), "prompt_embeds_mask": F.pad(mask, (0, missing))}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        tokens = transformer(
            hidden_states=pack(noisy),
            timestep=level,
            guidance=embedded_guidance(transformer, noisy, guidance),
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_embeds_mask"],
            img_shapes=[[(1, height // 2, width // 2)]] * len(noisy),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def idle_layers(self, transformer: ModelMixin) -> list[str]:
        """The last block's output of the text stream."""
        last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}"
        return [f"{last}.attn.to_add_out", f"{last}.txt_mlp"]

    def _call_arguments(
        self, prompts: list[str], height: int, width: int, guidance_scale: float, max_length: int | None
    ) -> dict[str, Any]:
        arguments = super()._call_arguments(prompts, height, width, guidance_scale, max_length)
        del arguments["guidance_scale"]
        negative = {"negative_prompt": [""] * len(prompts)} if guidance_scale > 1 else {}
        return arguments | {"true_cfg_scale": guidance_scale} | negative


class Krea2(PipelineFamily):
    """Krea 2: states of several layers of a language model, on Qwen-Image's autoencoder."""

    pipelines = ("Krea2Pipeline",)
    text_length = 512
    packed = True
    lora_targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        embeds, mask = pipe.encode_prompt(prompts, device=pipe.text_encoder.device, max_sequence_length=length)
        return {"prompt_embeds": embeds, "prompt_embeds_mask": mask}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        text = conditioning["prompt_embeds"]
        height, width = noisy.shape[-2:]
        places = F.pad(token_positions(height // 2, width // 2), (0, 0, text.shape[1], 0))  # texts are at the origin
        tokens = transformer(
            hidden_states=pack(noisy),
            timestep=level,
            encoder_hidden_states=text,
            encoder_attention_mask=conditioning["prompt_embeds_mask"],
            position_ids=places.to(noisy.device),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    def timestep_shift(self, pipe: DiffusionPipeline, tokens: int) -> float:
        """As in the base class; distilled models sample with one shift at every number of tokens."""
        dynamic = pipe.scheduler.config.use_dynamic_shifting and pipe.config.is_distilled
        return math.exp(1.15) if dynamic else super().timestep_shift(pipe, tokens)

    def _call_arguments(
        self, prompts: list[str], height: int, width: int, guidance_scale: float, max_length: int | None
    ) -> dict[str, Any]:
        arguments = super()._call_arguments(prompts, height, width, guidance_scale, max_length)
        return arguments | {"guidance_scale": max(0.0, guidance_scale - 1)}  # the pipeline's 0 is none


register_family(QwenImage())
register_family(Krea2())
