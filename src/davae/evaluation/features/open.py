"""Opening feature networks by name, with reasons for those that are unavailable."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch

from davae.errors import DavaeError
from davae.evaluation.features.efficientnet import EfficientNetLite0
from davae.evaluation.features.inception import Inception
from davae.evaluation.features.network import FeatureNetwork
from davae.evaluation.features.transformers_model import TransformersFeatures

Part = TypeVar("Part")


def open_network(name: str, *, device: str | torch.device = "cpu") -> FeatureNetwork:
    """A feature network by name.

    Args:
        name: ``inception`` or ``inception:FILE``, ``efficientnet-lite0``, or a transformers model by folder or name.
        device: to compute on.

    Raises:
        DavaeError: weights or a package are missing; the message names the file, where it was looked for, and how to
            get it.
    """
    if name == "inception" or name.startswith("inception:"):
        return Inception(name.partition(":")[2] or None, device=device)
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device=device)
    return TransformersFeatures(name, device=device)


def open_networks(names: Sequence[str], device: str, unavailable: dict[str, str]) -> list[FeatureNetwork]:
    """The available feature networks; for the others the reason is added to ``unavailable`` as ``fid/NAME``."""
    opened = [or_unavailable(f"fid/{name}", partial(open_network, name, device=device), unavailable) for name in names]
    return [network for network in opened if network is not None]


def or_unavailable(name: str, make: Callable[[], Part], unavailable: dict[str, str]) -> Part | None:
    """The result of ``make``; on a :class:`DavaeError` ``None``, with the reason added to ``unavailable``."""
    try:
        return make()
    except DavaeError as error:
        unavailable[name] = str(error)
        return None
