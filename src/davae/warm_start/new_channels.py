"""Which weights of a widened transformer belong to the detail channels."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from davae.errors import WarmStartError
from davae.latents import LatentLayout
from davae.warm_start.description import ChannelPlace
from davae.warm_start.registry import description_of


def channel_parameters(transformer: nn.Module) -> list[str]:
    """Names of the parameters that have an axis of latent channels: those of the input and output layers.

    Raises:
        WarmStartError: the class is not described and cannot be probed, or a LoRA wraps one of these layers.
    """
    present = dict(transformer.named_parameters())
    return [place.parameter for place in _present(description_of(transformer).places, present)]


def new_channel_masks(transformer: nn.Module, layout: LatentLayout) -> dict[str, Tensor]:
    """For each parameter with latent channels, a mask of the entries that belong to the detail channels.

    Args:
        transformer: a widened transformer.
        layout: its base and detail channels.

    Returns:
        By parameter name, a boolean tensor of the parameter's shape, true for detail channels.
    """
    description = description_of(transformer).fitted(transformer, layout.channels)
    sizes = description.resolve_sizes(transformer)
    parameters = dict(transformer.named_parameters())
    masks = {}
    for place in _present(description.places, parameters):
        base, _ = place.split(parameters[place.parameter].detach(), sizes, layout)
        masks[place.parameter] = place.widen(torch.ones_like(base), sizes, layout) == 0
    return masks


def _present(places: Sequence[ChannelPlace], parameters: Mapping[str, Tensor]) -> list[ChannelPlace]:
    """The places whose parameters are present.

    Raises:
        WarmStartError: one that is not optional is missing.
    """
    missing = [p for p in places if p.parameter not in parameters and not p.optional]
    if missing:
        raise WarmStartError(
            f"there is no parameter {missing[0].parameter}: if {missing[0].layer} has a LoRA, remove that layer "
            "from its targets (new channels are trained in full)"
        )
    return [p for p in places if p.parameter in parameters]
