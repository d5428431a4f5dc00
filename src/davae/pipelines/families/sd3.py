"""Stable Diffusion 3 and 3.5: two CLIPs and T5, times of 1000 sigma."""

from __future__ import annotations

import diffusers
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.models import AutoencoderDA
from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class StableDiffusion3(PipelineFamily):
    """The targets are the official training's: image stream, second feed-forward layer, modulation."""

    pipelines = (
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
    )
    extra_text_tokens = 77  # of the CLIPs, whatever the prompt, before T5's
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear")

    def _encode(
        self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool
    ) -> dict[str, Tensor]:
        embeds, _, pooled, _ = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def _predict(
        self,
        transformer: ModelMixin,
        noisy: Tensor,
        level: Tensor,
        conditioning: Conditioning,
        guidance: float,
    ) -> Tensor:
        return transformer(
            hidden_states=noisy,
            timestep=level * 1000,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def mend(self, pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
        """The inpainting pipeline counts channels."""
        if type(pipe) is diffusers.StableDiffusion3InpaintPipeline:
            from davae.pipelines.families.sd3_inpaint import (  # imports all of SD3: only here
                StableDiffusion3InpaintPipeline,
            )

            pipe.__class__ = StableDiffusion3InpaintPipeline


register_family(StableDiffusion3())
