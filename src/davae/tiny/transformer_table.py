"""The table of ``davae doctor --transformers``: each class, how its channels were found, and the proof."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.models.modeling_utils import ModelMixin

from davae.latents import LatentLayout
from davae.tiny.small_transformers import EXCLUDED_TRANSFORMERS, SMALL_CHANNELS, SMALL_TRANSFORMERS
from davae.warm_start import (
    ChannelDescription,
    ChannelPlace,
    WarmStartError,
    check_warm_start,
    description_of,
    probed_description,
    widen_channels,
)

_LAYOUT = LatentLayout(SMALL_CHANNELS, 6)


def transformer_table() -> str:
    """Markdown: every image transformer class of the installed diffusers, widened on the spot, then the others.

    "Verified difference" is the largest difference of base outputs after widening, relative to the largest
    output, with the channel layers' weights random and details of up to 100 standard deviations; detail outputs
    are exactly zero, or the row would not be there.
    """
    lines = [
        "| class | resolved | input layers | output layers | verified difference |",
        "|---|---|---|---|---|",
    ]
    lines += [transformer_row(name) for name in sorted(SMALL_TRANSFORMERS)]
    lines += ["", "| not widened | because |", "|---|---|"]
    lines += [f"| `{name}` | {reason} |" for name, reason in sorted(EXCLUDED_TRANSFORMERS.items())]
    return "\n".join(lines)


def transformer_row(name: str) -> str:
    """One line of the table: a class of `SMALL_TRANSFORMERS`, widened and checked.

    Raises:
        WarmStartError: it does not start as the original.
    """
    model = SMALL_TRANSFORMERS[name]()
    widened = widen_channels(
        model, base_channels=_LAYOUT.base_channels, detail_channels=_LAYOUT.detail_channels
    )
    report = check_warm_start(model, widened, _LAYOUT)
    difference = max(report.max_base_difference, report.max_base_difference_random)
    description = description_of(model).fitted(model, _LAYOUT.base_channels)
    resolved: str = description.source
    if resolved == "described" and _probing_agrees(model, description):
        resolved = "described, probed alike"
    told = f"{difference:.0e}" if difference else "0"
    return (
        f"| `{name}` | {resolved} | {_places(description.inputs)} | {_places(description.outputs)} | {told} |"
    )


def _places(places: Sequence[ChannelPlace]) -> str:
    """``layer`` (pattern), each layer once."""
    layers = {place.layer: place.pattern.replace("|", "\\|") for place in places}
    return ", ".join(f"`{layer}` ({pattern})" for layer, pattern in layers.items())


def _probing_agrees(model: ModelMixin, described: ChannelDescription) -> bool:
    """Whether probing alone finds the same entries of the same parameters."""
    try:
        probed = probed_description(model).fitted(model, _LAYOUT.base_channels)
    except WarmStartError:
        return False
    mine, other = (_new_entries(model, description) for description in (described, probed))
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def _new_entries(model: ModelMixin, description: ChannelDescription) -> dict[str, torch.Tensor]:
    sizes, parameters = description.resolve_sizes(model), dict(model.named_parameters())
    return {
        place.parameter: place.widen(torch.ones_like(parameters[place.parameter]), sizes, _LAYOUT) == 0
        for place in description.places
        if place.parameter in parameters
    }
