"""FLUX.1: CLIP's pooled vector and T5, latents packed two by two, an embedded guidance scale."""

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.pipelines.families.family import Conditioning, PipelineFamily, pack, register_family, unpack


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
        embedded = noisy.new_full((len(noisy),), guidance, dtype=torch.float32)
        tokens = transformer(
            hidden_states=pack(noisy),
            timestep=level,
            guidance=embedded if transformer.config.guidance_embeds else None,
            pooled_projections=conditioning["pooled_prompt_embeds"],
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=_positions(height // 2, width // 2).to(text),
            return_dict=False,
        )[0]
        return unpack(tokens, height, width)


def _positions(rows: int, columns: int) -> Tensor:
    """``[rows * columns, 3]``: 0, row, column of each token."""
    grid = torch.zeros(rows, columns, 3)
    grid[..., 1] = torch.arange(rows)[:, None]
    grid[..., 2] = torch.arange(columns)[None]
    return grid.flatten(0, 1)


register_family(Flux())
