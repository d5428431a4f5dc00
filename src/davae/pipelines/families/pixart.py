"""PixArt-Sigma: T5 with a mask, DDPM noise prediction, a variance head that its samplers ignore."""

from typing import Any

from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor

from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class PixArtSigma(PipelineFamily):
    """DDPM with a learned variance, which sampling ignores.

    LoRA targets are the attention and feed-forward layers of diffusers' PixArt example, without its ``proj``,
    ``proj_in`` and ``proj_out``: these names also match the patch embedder and the head, which are trained in full.
    """

    pipelines = ("PixArtSigmaPipeline",)
    kind = "ddpm"
    text_length = 300
    sizes = "listed"
    reads_shift = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipe.text_encoder.device,
            max_sequence_length=length,
            clean_caption=_cleans_captions(),
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return transformer(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=level,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]

    def _call_arguments(
        self, prompts: list[str], height: int, width: int, guidance_scale: float, max_length: int | None
    ) -> dict[str, Any]:
        arguments = super()._call_arguments(prompts, height, width, guidance_scale, max_length)
        return arguments | {"clean_caption": _cleans_captions()}


def _cleans_captions() -> bool:
    """Whether the packages with which the pipeline cleans captions by default are installed."""
    return bool(is_bs4_available() and is_ftfy_available())


register_family(PixArtSigma())
