"""Z-Image: a language model's states without padding, latents as a list of frames, a time that runs the other way."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class ZImage(PipelineFamily):
    """Text embeddings are padded and masked here, because the pipeline keeps a list of them, each of its own length."""

    pipelines = ("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline")
    text_length = 512
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        found, _ = pipe.encode_prompt(
            list(prompts),  # which the pipeline changes
            device=pipe.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=length,
        )
        padded = torch.stack([F.pad(text, (0, 0, 0, length - len(text))) for text in found])
        counts = torch.tensor([len(text) for text in found], device=padded.device)
        return {
            "prompt_embeds": padded,
            "prompt_embeds_mask": torch.arange(length, device=padded.device) < counts[:, None],
        }

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        texts = zip(conditioning["prompt_embeds"], conditioning["prompt_embeds_mask"], strict=True)
        frames = list(noisy.unsqueeze(2).unbind(0))
        found = transformer(frames, 1 - level, [text[mask] for text, mask in texts], return_dict=False)[0]
        return -torch.stack(list(found)).squeeze(2)

    def tokens(self, transformer: ModelMixin, latent: Tensor) -> int:
        """As in the base class; the configuration lists patch sizes, of which the first is used."""
        patch = int(transformer.config.all_patch_size[0])
        return (latent.shape[-2] // patch) * (latent.shape[-1] // patch)

    def _embedded(
        self, pipe: DiffusionPipeline, conditioning: Sequence[Conditioning], empty: Conditioning
    ) -> dict[str, Any]:
        def texts(found: Sequence[Conditioning]) -> list[Tensor]:
            whole = [one["prompt_embeds"][one["prompt_embeds_mask"].bool()] for one in found]
            return [text.to(pipe.transformer.device, pipe.transformer.dtype) for text in whole]

        return {"prompt_embeds": texts(conditioning), "negative_prompt_embeds": texts([empty] * len(conditioning))}


register_family(ZImage())
