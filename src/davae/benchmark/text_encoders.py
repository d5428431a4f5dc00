"""A pipeline's text encoders with random weights, as far as their cost matters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from davae.benchmark.flops import count_flops
from davae.benchmark.planner_architectures import Architecture, build_text_encoder


class TextEncoders(nn.Module):
    """All text encoders of a pipeline, run on random tokens.

    Args:
        architecture: whose ``text_encoders`` describe them.
        length: tokens that prompts are padded to; CLIP's own length where it is shorter.
        device, dtype: where and in what precision.

    Raises:
        DavaeError: an encoder's class is unknown to transformers.
    """

    def __init__(
        self,
        architecture: Architecture,
        length: int,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
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
        """Encode so many prompts in one batch, with every encoder."""
        for name, encoder in self.encoders.items():
            encoder(input_ids=self.tokens[name].expand(prompts, -1), output_hidden_states=True)

    def flops(self, prompts: int) -> int:
        """Operations of :meth:`encode`."""
        return count_flops(lambda: self.encode(prompts))


def text_encoders_of(
    architecture: Architecture, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoders | None:
    """The text encoders at the pipeline's prompt length; none where its configuration describes none."""
    if not architecture.text_encoders:
        return None
    return TextEncoders(architecture, architecture.prompt_length, device=device, dtype=dtype)
