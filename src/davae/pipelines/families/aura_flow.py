"""AuraFlow: a T5 encoder whose padded states are set to zero; the transformer's time is sigma."""

from collections.abc import Sequence

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class AuraFlow(PipelineFamily):
    """The pipeline applies the mask to the embeddings; the transformer takes no mask."""

    pipelines = ("AuraFlowPipeline",)
    reads_shift = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        embeds, _, _, _ = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=pipe.text_encoder.device, max_sequence_length=length
        )
        return {"prompt_embeds": embeds}

    def _embedded(
        self, pipe: DiffusionPipeline, conditioning: Sequence[Conditioning], empty: Conditioning
    ) -> dict[str, Tensor]:
        found = super()._embedded(pipe, conditioning, empty)
        masks = {  # asked for, and not used, since embeddings are masked already
            name.replace("prompt_embeds", "prompt_attention_mask"): torch.ones(value.shape[:2], dtype=torch.long)
            for name, value in found.items()
        }
        return found | masks

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return transformer(
            noisy, encoder_hidden_states=conditioning["prompt_embeds"], timestep=level, return_dict=False
        )[0]


register_family(AuraFlow())
