"""Ideogram 4: text before the image in one sequence, latents packed with the channel fastest, two transformers.

The second transformer of the base predicts without a text, for guidance. It knows no details, and a tuned transformer,
which has learned to predict without a prompt too, takes its place.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline, Ideogram4Pipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.transformer_ideogram4 import LLM_TOKEN_INDICATOR
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS
from torch import Tensor

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.latent_space import encode
from davae.pipelines.families.family import Conditioning, PipelineFamily, pack, register_family, unpack

_SIDE = 512  # of the image, in pixels, whose noise levels have no shift


class Ideogram4(PipelineFamily):
    """Texts are padded on the left and masked; a prompt that is left out is masked whole.

    LoRA targets as in diffusers' Ideogram 4 example.
    """

    pipelines = ("Ideogram4Pipeline",)
    text_length = 512
    packed = True
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    shift_rule = "has its own rule for the shift, which depends on the height and width in pixels"
    shift_reads_pixels = True
    follow_transformer = ("unconditional_transformer",)

    def tell_cut_prompts(self, pipe: DiffusionPipeline, prompts: Sequence[str], max_length: int | None = None) -> int:
        """0, since the pipeline cuts nothing.

        Raises:
            DavaeError: a prompt has more tokens than it is padded to.
        """
        length = max_length or self.text_length
        found = [len(pipe.tokenizer(_chat(pipe, prompt), add_special_tokens=False).input_ids) for prompt in prompts]
        if max(found, default=0) > length:
            raise DavaeError(
                f"{sum(count > length for count in found)} of {len(found)} prompts have more than {length} tokens, the "
                f"longest {max(found)}, and {self.name} cuts none: set diffusion.prompts.max_length={max(found)}"
            )
        return 0

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        encoder = pipe.text_encoder
        if empty:
            width = len(QWEN3_VL_ACTIVATION_LAYERS) * encoder.language_model.config.hidden_size
            embeds = torch.zeros(len(prompts), length, width, device=encoder.device)
            mask = torch.zeros(len(prompts), length, dtype=torch.bool, device=encoder.device)
        else:
            embeds, _, _, indicator = pipe.encode_prompt(prompts, 0, 0, length, encoder.device)
            mask = indicator == LLM_TOKEN_INDICATOR
        return {"prompt_embeds": embeds.to(encoder.dtype), "prompt_embeds_mask": mask}  # as the encoder computes them

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        height, width = noisy.shape[-2:]
        text, places, segments, indicator = _sequence(conditioning, height // 2, width // 2)
        before = conditioning["prompt_embeds"].shape[1]
        image = _pack(noisy)
        tokens = transformer(
            hidden_states=torch.cat([image.new_zeros(len(image), before, image.shape[-1]), image], dim=1),
            timestep=1 - level,
            encoder_hidden_states=text,
            position_ids=places,
            segment_ids=segments,
            indicator=indicator,
            return_dict=False,
        )[0]
        return -_unpack(tokens[:, before:], height, width)

    @torch.no_grad()
    def latents_of(self, vae: ModelMixin, images: Tensor, *, details_seed: int | None = None) -> Tensor:
        """As in the base class; the scale is that of the batch norm's statistics."""
        latents = encode(vae, images, details_seed=details_seed)
        mean, std = _scale(vae, latents)
        return _unpack((_pack(latents) - mean) / std, *latents.shape[-2:])

    def raw_base(self, base_vae: ModelMixin, base: Tensor) -> Tensor:
        """As in the base class; the scale is that of the batch norm's statistics."""
        mean, std = _scale(base_vae, base)
        return _unpack(_pack(base) * std + mean, *base.shape[-2:])

    def timestep_shift(self, pipe: DiffusionPipeline, tokens: int) -> float:
        """The side of a square image of so many tokens over 512 pixels, times the scheduler's own shift.

        The pipeline's noise levels are logit-normal, with a mean of half the logarithm of the number of pixels over
        512 x 512, and a standard deviation of 1.5 (``timesteps.logit_std``).
        """
        side = 2 * pipe.vae_scale_factor * tokens**0.5
        return side / _SIDE * super().timestep_shift(pipe, tokens)

    def mend(self, pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
        """Arrange the batch norm's statistics as this class's tokens: all channels of a position, then the next."""
        mean, variance = _statistics(vae)
        vae.bn.running_mean.copy_(mean)
        vae.bn.running_var.copy_(variance)

    @torch.no_grad()
    def sample(
        self,
        pipe: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        max_length: int | None = None,
        embeddings: Mapping[str, Conditioning] | None = None,
        **options: Any,
    ) -> Tensor:
        """As in the base class; the pipeline, which takes no embeddings, is given them where it would encode."""
        if embeddings is None:
            return super().sample(pipe, prompts, max_length=max_length, **options)
        found = [embeddings[prompt] for prompt in prompts]
        stacked = {name: torch.stack([one[name] for one in found]) for name in found[0]}

        def encoded(*, grid_h: int, grid_w: int, device: Any, **_: Any) -> tuple[Tensor, ...]:
            return _sequence({name: value.to(device) for name, value in stacked.items()}, grid_h, grid_w)

        pipe.encode_prompt = encoded
        try:
            return super().sample(pipe, prompts, max_length=stacked["prompt_embeds"].shape[1], **options)
        finally:
            del pipe.encode_prompt

    def _call_arguments(
        self, prompts: list[str], height: int, width: int, guidance_scale: float, max_length: int | None
    ) -> dict[str, Any]:
        arguments = super()._call_arguments(prompts, height, width, guidance_scale, max_length)
        return arguments | {"guidance_schedule": None}


def _chat(pipe: DiffusionPipeline, prompt: str) -> str:
    """A prompt in the pipeline's template."""
    message = {"role": "user", "content": [{"type": "text", "text": prompt}]}
    return str(pipe.tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False))


def _sequence(conditioning: Conditioning, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, places, segments and roles of the tokens of a text and an image, as the pipeline has them."""
    text = conditioning["prompt_embeds"]
    lengths = conditioning["prompt_embeds_mask"].sum(dim=1).tolist()
    ids = Ideogram4Pipeline._prepare_ids(lengths, rows, columns, text.shape[1], text.device)
    return torch.cat([text, text.new_zeros(len(text), rows * columns, text.shape[2])], dim=1), *ids


def _pack(latent: Tensor) -> Tensor:
    """``[B, C, h, w]`` to tokens ``[B, h/2 * w/2, 4 * C]``, the channel fastest in a token."""
    return pack(latent).unflatten(-1, (-1, 4)).transpose(-1, -2).flatten(-2)


def _unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`_pack`."""
    return unpack(tokens.unflatten(-1, (4, -1)).transpose(-1, -2).flatten(-2), height, width)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[4 * C]`` of a token's features; details, which are scaled already, have 0 and 1."""
    if not isinstance(vae, AutoencoderDA):
        return vae.bn.running_mean, vae.bn.running_var
    details, neutral = vae.layout.detail_channels, (0.0, 1.0 - vae.config.batch_norm_eps)
    found = []
    for known, value in zip(_statistics(vae.base_vae), neutral):
        by_position = known.unflatten(0, (4, -1))
        found.append(torch.cat([by_position, by_position.new_full((4, details), value)], dim=1).flatten())
    return found[0], found[1]


def _scale(vae: ModelMixin, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a token's features."""
    mean, variance = (value.to(like) for value in _statistics(vae))
    return mean, (variance + vae.config.batch_norm_eps).sqrt()


register_family(Ideogram4())
