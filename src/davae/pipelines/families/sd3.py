"""Stable Diffusion 3 and 3.5: two CLIPs and T5; the transformer's time is 1000 sigma."""

import functools
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.models import AutoencoderDA
from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class StableDiffusion3(PipelineFamily):
    """LoRA targets as in the official training: image stream, second feed-forward layer, modulation."""

    pipelines = ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline")
    longest_text = 512
    extra_text_tokens = 77  # of the CLIP encoders, in front of T5's
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "norm1.linear")

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
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
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return transformer(
            hidden_states=noisy,
            timestep=level * 1000,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def mend(self, pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
        """Replace the class of an inpainting pipeline, which accepts only certain channel counts."""
        if type(pipe) is diffusers.StableDiffusion3InpaintPipeline:
            pipe.__class__ = StableDiffusion3InpaintPipeline


register_family(StableDiffusion3())


_PLAIN = 16  # input channels by which the class recognises a transformer without mask input


class _SeenAsPlain:
    """A transformer that reports 16 input channels in its configuration and is unchanged otherwise."""

    def __init__(self, transformer: ModelMixin) -> None:
        self.plain_transformer = transformer
        self.config = FrozenDict({**transformer.config, "in_channels": _PLAIN})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain_transformer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain_transformer, name)


class StableDiffusion3InpaintPipeline(diffusers.StableDiffusion3InpaintPipeline):
    """As in diffusers, but for any number of latent channels; the class name in saved pipelines is the same."""

    @functools.wraps(diffusers.StableDiffusion3InpaintPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        self.__dict__["transformer"] = _SeenAsPlain(self.transformer)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._unveil()

    def maybe_free_model_hooks(self) -> None:
        """As in diffusers, after restoring the original transformer, whose hooks are meant."""
        self._unveil()
        super().maybe_free_model_hooks()

    def _unveil(self) -> None:
        if isinstance(self.transformer, _SeenAsPlain):
            self.__dict__["transformer"] = self.transformer.plain_transformer
