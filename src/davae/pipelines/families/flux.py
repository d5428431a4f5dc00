"""FLUX.1, Chroma and FLUX.2: latents packed two by two, and but for Chroma an embedded guidance scale.

FLUX.1 reads CLIP's pooled vector and T5; Chroma T5; FLUX.2 some layers of a language model.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from davae.models.latent_space import encode
from davae.pipelines.families.family import (
    Conditioning,
    PipelineFamily,
    embedded_guidance,
    pack,
    register_family,
    unpack,
)


class Flux(PipelineFamily):
    """LoRA targets as in diffusers' FLUX example: attention and feed-forward layers of both streams."""

    pipelines = ("FluxPipeline", "FluxImg2ImgPipeline", "FluxInpaintPipeline")
    text_length = 512
    longest_text = 512
    packed = True
    lora_targets = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        embeds, pooled, _ = pipe.encode_prompt(
            prompts, None, device=pipe.text_encoder.device, max_sequence_length=length
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        text = conditioning["prompt_embeds"]
        height, width = noisy.shape[-2:]
        tokens = transformer(
            hidden_states=pack(noisy),
            timestep=level,
            guidance=embedded_guidance(transformer, noisy, guidance),
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=token_positions(height // 2, width // 2).to(text),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


class Chroma(PipelineFamily):
    """Chroma: FLUX.1 without CLIP and without an embedded guidance scale, with a mask of the text.

    The padding of a text is masked up to its first token, here and in the pipeline, which guides with an empty prompt.
    """

    pipelines = ("ChromaPipeline", "ChromaImg2ImgPipeline", "ChromaInpaintPipeline")
    text_length = 512
    longest_text = 512
    packed = True
    lora_targets = Flux.lora_targets

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        embeds, _, mask, *_ = pipe.encode_prompt(
            prompts, device=pipe.text_encoder.device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        text, mask = conditioning["prompt_embeds"], conditioning["prompt_attention_mask"]
        height, width = noisy.shape[-2:]
        image = pack(noisy)
        tokens = transformer(
            hidden_states=image,
            timestep=level,
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=token_positions(height // 2, width // 2).to(text),
            attention_mask=torch.cat([mask, mask.new_ones(image.shape[:2])], dim=1),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def token_positions(rows: int, columns: int) -> Tensor:
    """``[rows * columns, 3]``: 0, row, column of each token."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None]
    return grid.flatten(0, 1)


class Flux2(PipelineFamily):
    """FLUX.2: each feature of a packed token is normalised separately, by a batch norm.

    LoRA targets as in diffusers' FLUX.2 example.
    """

    pipelines: ClassVar[tuple[str, ...]] = ("Flux2Pipeline",)
    text_length = 512
    packed = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
    shift_rule = "has its own rule for the shift, which depends only on the number of tokens and of steps"

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        embeds, _ = pipe.encode_prompt(prompts, device=pipe.text_encoder.device, max_sequence_length=length)
        return {"prompt_embeds": embeds}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        text = conditioning["prompt_embeds"]
        height, width = noisy.shape[-2:]
        # Frame, row, column and place in the text of each token.
        image_places = F.pad(token_positions(height // 2, width // 2), (0, 1))
        text_places = F.pad(torch.arange(text.shape[1])[:, None], (3, 0))
        tokens = transformer(
            hidden_states=pack(noisy),
            timestep=level,
            guidance=embedded_guidance(transformer, noisy, guidance),
            encoder_hidden_states=text,
            txt_ids=text_places.expand(len(noisy), -1, -1).to(noisy.device),
            img_ids=image_places.expand(len(noisy), -1, -1).to(noisy.device),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)

    @torch.no_grad()
    def latents_of(self, vae: ModelMixin, images: Tensor, *, details_seed: int | None = None) -> Tensor:
        """As in the base class; the scale is that of the batch norm's statistics."""
        latents = encode(vae, images, details_seed=details_seed)
        mean, std = _statistics(vae, latents)
        return pixel_shuffle((pixel_unshuffle(latents, 2) - mean) / std, 2)

    def raw_base(self, base_vae: ModelMixin, base: Tensor) -> Tensor:
        """As in the base class; the scale is that of the batch norm's statistics."""
        mean, std = _statistics(base_vae, base)
        return pixel_shuffle(pixel_unshuffle(base, 2) * std + mean, 2)

    def timestep_shift(self, pipe: DiffusionPipeline, tokens: int) -> float:
        """The shift of the pipelines' own rule, at their default of 50 steps; a fixed one if the scheduler has it."""
        dynamic = pipe.scheduler.config.use_dynamic_shifting
        return math.exp(compute_empirical_mu(tokens, 50)) if dynamic else super().timestep_shift(pipe, tokens)


class Flux2Klein(Flux2):
    """FLUX.2 klein, with another language model."""

    pipelines = ("Flux2KleinPipeline", "Flux2KleinInpaintPipeline")


class Flux2KleinKV(Flux2):
    """FLUX.2 klein that keeps keys and values of reference images."""

    pipelines = ("Flux2KleinKVPipeline",)


def _statistics(vae: ModelMixin, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a FLUX.2 autoencoder's packed features, ``[1, 4 C, 1, 1]``."""
    mean, variance = (v.view(1, -1, 1, 1).to(like) for v in (vae.bn.running_mean, vae.bn.running_var))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


for _family in (Flux, Chroma, Flux2, Flux2Klein, Flux2KleinKV):
    register_family(_family())
