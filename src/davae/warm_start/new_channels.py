"""Which weights of a widened transformer belong to the detail channels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from davae.latents import LatentLayout
from davae.warm_start.channel_places import description_of, split_axis, widen_axis


def channel_parameters(transformer: nn.Module) -> list[str]:
    """Names of the parameters on which latent channels sit: the input and output layers' own.

    Raises:
        WarmStartError: the class is not described.
    """
    present = dict(transformer.named_parameters())
    places = description_of(transformer).places
    return [place.parameter for place in places if not place.optional or place.parameter in present]


def new_channel_masks(transformer: nn.Module, layout: LatentLayout) -> dict[str, Tensor]:
    """For each parameter with channels, true where an entry belongs to the detail channels.

    Args:
        transformer: a widened transformer.
        layout: its base and detail channels.

    Returns:
        Parameter name to a boolean tensor of the parameter's shape.
    """
    description = description_of(transformer)
    sizes = description.resolve_sizes(transformer)
    parameters = dict(transformer.named_parameters())
    masks = {}
    for place in description.places:
        if place.optional and place.parameter not in parameters:
            continue
        base, _ = split_axis(parameters[place.parameter].detach(), place, sizes, layout)
        masks[place.parameter] = widen_axis(torch.ones_like(base), place, sizes, layout) == 0
    return masks
