"""What a feature network is, and how one is found by name."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
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


def open_network(name: str, *, device: str | torch.device = "cpu") -> FeatureNetwork:
    """A feature network by name.

    Args:
        name: ``inception`` or ``inception:FILE``, ``efficientnet-lite0``, or a transformers model by folder or name.
        device: where it computes.

    Raises:
        DavaeError: weights or a package are missing; the message names the file, where it was looked for, and how to
            get it.
    """
    # Here, so that naming one network does not import what the others need.
    if name == "inception" or name.startswith("inception:"):
        from davae.evaluation.features.inception import Inception

        return Inception(name.partition(":")[2] or None, device=device)
    if name == "efficientnet-lite0":
        from davae.evaluation.features.efficientnet import EfficientNetLite0

        return EfficientNetLite0(device=device)
    from davae.evaluation.features.transformers_model import TransformersFeatures

    return TransformersFeatures(name, device=device)
