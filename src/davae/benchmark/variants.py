"""The models of an inference benchmark: base, native and upgraded, with random weights.

Time and memory do not depend on the values of weights, so a configuration suffices; no weights are downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.latent_space import decode
from davae.pipelines.sampling.speed import compile_regions, order_channels_last
from davae.planner.architectures import Architecture, build, build_text_encoder
from davae.planner.memory import count_flops
from davae.planner.plan import default_detail_channels
from davae.warm_start import dummy_arguments


@dataclass
class Variant:
    """One way to generate an image: text encoders, a transformer and an autoencoder, with inputs.

    Attributes:
        name: ``base``, ``native``, ``upgraded xS`` or ``decoder alone xS``.
        resolution: side of the image in pixels.
        scale: of the upgrade; 1 for base and native.
        tokens: image tokens.
        transformer, vae: in eval mode on the device.
        latent: standard normal ``[B, channels, h, w]``.
        arguments: keyword arguments of the transformer's forward, with both passes of guidance in one batch.
        steps: denoising steps per image.
        passes: 2 with classifier-free guidance, else 1.
        text: the text encoders, shared by all variants; ``None`` if there are none or they are not timed.
    """

    name: str
    resolution: int
    scale: int
    tokens: int
    transformer: ModelMixin
    vae: ModelMixin
    latent: Tensor
    arguments: dict[str, Any]
    steps: int
    passes: int
    text: TextEncoders | None = None

    @torch.inference_mode()
    def encode_text(self) -> None:
        """Encode the prompts of the batch, and those for guidance, together; once per image, not per step."""
        if self.text is not None:
            self.text.encode(self.passes * len(self.latent))

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass of the transformer for the batch, guidance included."""
        self.transformer(**self.arguments)

    @torch.inference_mode()
    def decode(self) -> None:
        """Decode the batch's latents, without gradients."""
        self.decoder()

    def decoder(self) -> Tensor:
        """The decoded images ``[B, 3, H, W]``, also for a base that is a video model."""
        return decode(self.vae, self.latent)

    def image(self) -> None:
        """The cost of a batch of images: text, every step, then the decoder."""
        self.encode_text()
        for _ in range(self.steps):
            self.step()
        self.decode()

    def text_flops(self) -> int:
        """FLOPs of the text encoders per image."""
        return 0 if self.text is None else self.text.flops(self.passes * len(self.latent)) // len(self.latent)

    def step_flops(self) -> int:
        """FLOPs of a step per image."""
        return count_flops(lambda: self.transformer(**self.arguments), fake=True) // len(self.latent)

    def decode_flops(self) -> int:
        """FLOPs of the decoder per image."""
        return count_flops(self.decoder, fake=True) // len(self.latent)


def make_variants(
    architecture: Architecture,
    *,
    resolution: int,
    scales: Sequence[int] = (2,),
    detail_channels: int | None = None,
    batch: int = 1,
    steps: int | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    encode_text: bool = True,
) -> list[Variant]:
    """The base at reduced resolution, the same model (native) at full resolution, an upgraded one per scale, and per
    scale the base with the joint decoder alone, which makes a full-size image of the base's latent.

    Args:
        architecture: what to build.
        resolution: side of the full image in pixels.
        scales: of the upgraded models; the base generates images of ``resolution // scales[0]`` pixels.
        detail_channels: ``D`` at every scale; by default `default_detail_channels`.
        batch: images at a time.
        steps: denoising steps; by default the pipeline's.
        device, dtype: of all models.
        encode_text: include the text encoders, if the architecture describes any.

    Raises:
        DavaeError: sizes that do not divide, or a text encoder of an unknown class.
    """
    encoders = text_encoders_of(architecture, device=device, dtype=dtype) if encode_text else None
    base, vae = _real(architecture.transformer, device, dtype), _real(architecture.vae, device, dtype)
    text = {"text_tokens": architecture.text_tokens} if architecture.text_tokens else {}
    made = []

    def add(name: str, side: int, scale: int, transformer: ModelMixin, decoder: ModelMixin) -> None:
        compression = architecture.base_compression * scale
        if side % (compression * architecture.patch):
            raise DavaeError(
                f"{name}: {side} pixels are not a multiple of {compression * architecture.patch} "
                f"(compression {compression} x patch {architecture.patch})"
            )
        channels = architecture.base_channels
        if isinstance(decoder, AutoencoderDA):
            channels = decoder.layout.channels
        grid = side // compression
        generator = torch.Generator().manual_seed(0)
        latent = torch.randn(batch, channels, grid, grid, generator=generator).to(device, dtype)
        passes = architecture.passes
        arguments = dummy_arguments(transformer, torch.cat([latent] * passes), generator, **text)
        made.append(
            Variant(
                name=name,
                resolution=side,
                scale=scale,
                tokens=(grid // architecture.patch) ** 2,
                transformer=transformer,
                vae=decoder,
                latent=latent,
                arguments=arguments,
                steps=steps or architecture.denoising_steps,
                passes=passes,
                text=encoders,
            )
        )

    add("base", resolution // scales[0], 1, base, vae)
    add("native", resolution, 1, base, vae)
    alone = {}
    for scale in scales:
        details = detail_channels or default_detail_channels(architecture.base_channels, scale)
        autoencoder = AutoencoderDA.from_base(vae, scale=scale, detail_channels=details, start="random")
        wide = architecture.build_transformer(details)
        wide_config = {**wide.config, "_class_name": type(wide).__name__}
        nn.Module.to(autoencoder, device, dtype)  # as _real does for the others, norms included
        order_channels_last(autoencoder)
        add(f"upgraded x{scale}", resolution, scale, _real(wide_config, device, dtype), autoencoder)
        alone[scale] = autoencoder.without_details()
    for scale, decoder in alone.items():
        order_channels_last(decoder)
        add(f"decoder alone x{scale}", resolution, scale, base, decoder)
    return made


def compile_parts(variants: Sequence[Variant]) -> None:
    """Compile the transformers' repeated blocks and the autoencoders' stages, alike for every variant."""
    parts = [part for c in variants for part in (c.transformer, c.vae)]
    for part in {id(part): part for part in parts}.values():
        compile_regions(part, one_size=True)


def _real(config: dict[str, Any], device: str, dtype: torch.dtype) -> ModelMixin:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(config, device=device)
    model.eval().requires_grad_(False)
    nn.Module.to(model, dtype)
    order_channels_last(model)
    return model


class TextEncoders(nn.Module):
    """All text encoders of a pipeline, run on random tokens.

    Args:
        architecture: describes them in ``text_encoders``.
        length: tokens that prompts are padded to, at most an encoder's maximum; CLIP always gets its full length.
        device, dtype: of the encoders.

    Raises:
        DavaeError: transformers does not know an encoder's class.
    """

    def __init__(
        self, architecture: Architecture, length: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict()
        self.tokens: dict[str, Tensor] = {}  # of one prompt, [1, n]
        generator = torch.Generator().manual_seed(0)
        for name, config in architecture.text_encoders.items():
            encoder: Any = build_text_encoder(name, config, device).to(dtype).eval().requires_grad_(False)
            self.encoders[name] = encoder
            text = encoder.config.get_text_config()
            length_here = min(length, getattr(text, "max_position_embeddings", None) or length)
            if encoder.config.model_type == "clip_text_model":
                length_here = text.max_position_embeddings  # CLIP's prompts always have its full length
            ids = torch.randint(3, text.vocab_size, (1, length_here), generator=generator)
            self.tokens[name] = ids.to(device)

    @torch.no_grad()
    def encode(self, prompts: int) -> None:
        """Encode so many prompts in one batch with every encoder."""
        for name, encoder in self.encoders.items():
            encoder(input_ids=self.tokens[name].expand(prompts, -1), output_hidden_states=True)

    def flops(self, prompts: int) -> int:
        """FLOPs of :meth:`encode`."""
        return count_flops(lambda: self.encode(prompts))


def text_encoders_of(
    architecture: Architecture, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoders | None:
    """The text encoders at the pipeline's prompt length; ``None`` if its configuration describes none."""
    if not architecture.text_encoders:
        return None
    return TextEncoders(architecture, architecture.prompt_length, device=device, dtype=dtype)
