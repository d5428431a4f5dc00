"""A feature network by name."""

from __future__ import annotations

import torch

from davae.evaluation.features.efficientnet import EfficientNetLite0
from davae.evaluation.features.inception import Inception
from davae.evaluation.features.network import FeatureNetwork
from davae.evaluation.features.transformers_model import TransformersFeatures


def open_network(name: str, *, device: str | torch.device = "cpu") -> FeatureNetwork:
    """A feature network by name.

    Args:
        name: ``inception`` or ``inception:FILE``, ``efficientnet-lite0``, or a transformers model by folder or name.
        device: where it computes.

    Raises:
        DavaeError: weights or a package are missing; the message names the file, where it was looked for, and how to
            get it.
    """
    if name == "inception" or name.startswith("inception:"):
        return Inception(name.partition(":")[2] or None, device=device)
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device=device)
    return TransformersFeatures(name, device=device)
