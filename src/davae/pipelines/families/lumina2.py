"""Lumina 2: Gemma with a system prompt; the transformer takes the time 1 - sigma and predicts data - noise."""

from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.models import AutoencoderDA
from davae.pipelines.families.class_fixes import add_zero_detail_guard
from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family, scheduler_shift
from davae.warm_start.plain_state import unwrapped


class Lumina2(PipelineFamily):
    """Prompts include the pipeline's system prompt; the empty prompt for guidance does not, as in the pipeline."""

    pipelines = ("Lumina2Pipeline",)
    longest_text = 512
    sizes = "fixed"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        device = pipe.text_encoder.device
        positive, mask, negative, negative_mask = pipe.encode_prompt(
            prompts, do_classifier_free_guidance=empty, device=device, max_sequence_length=length
        )
        if empty:
            positive, mask = negative, negative_mask
        return {"prompt_embeds": positive, "prompt_attention_mask": mask}

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return -transformer(
            hidden_states=noisy,
            timestep=1 - level,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_attention_mask"],
            return_dict=False,
        )[0]

    def timestep_shift(self, pipe: DiffusionPipeline, tokens: int) -> float:
        """As in the pipeline, which derives the shift from the number of channels instead of tokens."""
        return scheduler_shift(pipe.scheduler.config, int(pipe.transformer.config.in_channels))

    def shift_line_factor(self, *, native: bool, scale: int, channels: tuple[int, int]) -> float:
        """The ratio of the channel counts, so that more channels do not change the shift."""
        return channels[1] / channels[0]

    def mend(self, pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
        """Keep details off zero, because the pipeline divides guided predictions by their norm."""
        add_zero_detail_guard(unwrapped(pipe.transformer), vae.layout)


register_family(Lumina2())
