"""What a feature network is."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Features(NamedTuple):
    """Of a batch: rows ``[B, F]``, and class logits ``[B, K]`` where the network knows classes; float32."""

    rows: Tensor
    logits: Tensor | None = None


class FeatureNetwork(Protocol):
    """Images in, features out. Frozen, in evaluation mode."""

    name: str
    """As it was asked for."""

    def describe(self) -> dict[str, Any]:
        """Weights with their SHA-256, and the preprocessing: all that another needs to reach the same number."""

    def __call__(self, images: Tensor) -> Features:
        """Features of ``[B, 3, H, W]`` in [-1, 1], rounded to 8 bits first, as image files are."""
