"""SANA: Gemma with an instruction before the prompt, a deep-compression autoencoder without a shift."""

import inspect

from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class Sana(PipelineFamily):
    """Prompts include the pipeline's instruction; the empty prompt for guidance does not, as in the pipeline."""

    pipelines = ("SanaPipeline",)
    text_length = 300
    sizes = "listed"
    reads_shift = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"].default
        embeds, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=pipe.text_encoder.device,
            max_sequence_length=length,
            complex_human_instruction=None if empty else instruction,
        )
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return transformer(
            noisy,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            timestep=level * 1000 * transformer.config.timestep_scale,
            return_dict=False,
        )[0]


register_family(Sana())
