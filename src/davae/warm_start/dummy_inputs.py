"""Small random inputs for a transformer, used by the self-check, the probe and the FLOP counter."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.warm_start.description import DummyInputs

TEXT_TOKENS = 8  # of a dummy prompt


@dataclass(frozen=True)
class Dummy:
    """Builds inputs of a forward; random ones are drawn on the CPU, so that every device gets the same values.

    Attributes:
        transformer: the model to run.
        latent: [B, C, h, w], in the autoencoder's channels.
        generator: source of all random inputs; the amount drawn must not depend on C.
        text_tokens: number of tokens of a prompt.
    """

    transformer: ModelMixin
    latent: Tensor
    generator: torch.Generator
    text_tokens: int = TEXT_TOKENS

    @property
    def config(self) -> Any:
        """The transformer's configuration."""
        return self.transformer.config

    @property
    def batch(self) -> int:
        """The batch size B."""
        return self.latent.shape[0]

    def normal(self, *shape: int) -> Tensor:
        """Gaussian [B, *shape], in the latent's dtype and on its device."""
        return torch.randn((self.batch, *shape), generator=self.generator).to(self.latent)

    def text(self, features: int) -> Tensor:
        """Gaussian [B, text tokens, features]."""
        return self.normal(self.text_tokens, features)

    def text_mask(self, dtype: torch.dtype = torch.bool) -> Tensor:
        """Ones [B, text tokens]: no token is masked."""
        mask = torch.ones(self.batch, self.text_tokens, dtype=dtype, device=self.latent.device)
        return mask.as_subclass(_CountedMask) if mask.is_meta else mask

    def time(self, scale: float = 1.0) -> Tensor:
        """Uniform in [0, scale), float32 [B]."""
        return scale * torch.rand(self.batch, generator=self.generator).to(self.latent.device)

    def guidance(self, key: str = "guidance_embeds") -> Tensor | None:
        """A guidance scale [B] for guidance-distilled configurations, else None."""
        if not self.config.get(key):
            return None
        return torch.full((self.batch,), 3.5, device=self.latent.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high), int64 [B, *shape]."""
        drawn = torch.randint(high, (self.batch, *shape), generator=self.generator)
        return drawn.to(self.latent.device)

    def packing(self, features: int) -> int:
        """Side k of the squares that are packed into one position with ``C k k`` features."""
        return math.isqrt(max(features // self.latent.shape[1], 1))

    def packed(self, side: int, *, latents: int = 1) -> Tensor:
        """The latent as tokens [B, n, C k k], channel slowest, and `latents` - 1 others after it on the last axis."""
        tokens = [pack(latent, side) for latent in self.concatenated(latents)]
        return torch.cat(tokens, dim=2)

    def concatenated(self, latents: int) -> list[Tensor]:
        """The latent and `latents` - 1 spatial permutations of it, each [B, C, h, w]."""
        return [self.latent if i == 0 else self.latent.roll(i, -1).flip(-2) for i in range(latents)]

    def positions(self, side: int, axes: int = 3) -> Tensor:
        """(…, row, column) of each token, float32 [n, axes]; leading axes are 0."""
        height, width = self.grid(side)
        device = self.latent.device
        ids = torch.zeros(height, width, axes, device=device)
        ids[..., -2] = torch.arange(height, device=device)[:, None]
        ids[..., -1] = torch.arange(width, device=device)[None]
        return ids.flatten(0, 1)

    def grid(self, side: int) -> tuple[int, int]:
        """Rows and columns of tokens, each of ``side x side`` latent positions."""
        return self.latent.shape[2] // side, self.latent.shape[3] // side

    def zeros(self, *shape: int) -> Tensor:
        """float32 zeros [*shape]."""
        return torch.zeros(shape, device=self.latent.device)


class _CountedMask(Tensor):
    """A mask of ones on the meta device whose sums have values: some forwards read text lengths from them."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def sum(self, dim: int = -1, **options: Any) -> Tensor:  # type: ignore[override]
        """Sums over an axis, int64 on the CPU."""
        return torch.ones(self.shape, dtype=torch.int64).sum(dim, **options)


def pack(latent: Tensor, side: int) -> Tensor:
    """[B, C, h, w] as tokens [B, (h / k) (w / k), C k k] with k = ``side``, channel slowest."""
    return torch.nn.functional.pixel_unshuffle(latent, side).flatten(2).mT


DummyBuilder = Callable[[Dummy], dict[str, Any]]


def dummy(build: DummyBuilder) -> DummyInputs:
    """A `DummyInputs` from a function of a `Dummy`."""

    @functools.wraps(build)
    def inputs(transformer: ModelMixin, latent: Tensor, generator: torch.Generator, **options: Any) -> dict[str, Any]:
        return build(Dummy(transformer, latent, generator, **options))

    return inputs
