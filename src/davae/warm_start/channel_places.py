"""Where latent channels sit in the weights of a transformer.

A latent channel enters through some axis of an input layer and leaves through some axis of an output layer,
rarely alone on that axis: a head that predicts a patch of ``p x p`` positions has ``p * p * C`` features. A
pattern says how such an axis factors, slowest first: ``"c"`` is channels alone, ``"p p c"`` a patch with the
channel fastest, ``"c p p"`` with the channel slowest, ``"p p 2 c"`` a head with learned variance. A class is
described once; everything that widens or checks it reads the description.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.latents import LatentLayout
from davae.warm_start.errors import WarmStartError

#: Builds the keyword arguments of ``forward``: (transformer, latent [B, C, h, w], generator) -> arguments.
#: The latent is given in the autoencoder's channels, so a class that takes packed latents packs it here. The
#: other inputs come from the generator: the same seed must give the same values whatever the latent.
DummyInputs = Callable[[ModelMixin, Tensor, torch.Generator], dict[str, Any]]


@dataclass(frozen=True)
class ChannelPlace:
    """One axis of one parameter on which latent channels sit.

    Attributes:
        parameter: dotted name, as in ``named_parameters()``.
        axis: the axis of the channels.
        pattern: how the axis factors, slowest first; exactly one factor is ``c``.
        optional: the parameter may be absent (a bias).
    """

    parameter: str
    axis: int
    pattern: str = "c"
    optional: bool = False

    def __post_init__(self) -> None:
        if self.pattern.split().count("c") != 1:
            raise WarmStartError(f"{self.parameter}: pattern '{self.pattern}' must name the channel 'c' once")

    @property
    def layer(self) -> str:
        """The module that owns the parameter."""
        return self.parameter.rpartition(".")[0]


def input_layer(name: str, pattern: str = "c") -> tuple[ChannelPlace, ...]:
    """Places of a convolution or linear layer that takes latent channels; its bias does not see them."""
    return (ChannelPlace(f"{name}.weight", 1, pattern),)


def output_layer(name: str, pattern: str = "c") -> tuple[ChannelPlace, ...]:
    """Places of a convolution or linear layer that gives latent channels: rows of its weight and its bias."""
    return (
        ChannelPlace(f"{name}.weight", 0, pattern),
        ChannelPlace(f"{name}.bias", 0, pattern, optional=True),
    )


@dataclass(frozen=True)
class ChannelDescription:
    """Everything the warm start knows about a transformer class.

    Attributes:
        inputs: places through which latent channels enter.
        outputs: places through which they leave.
        dummy_inputs: makes small inputs for the self-check.
        sizes: the letters of the patterns: a configuration key to read, or a number.
        counts: what the configuration counts under each of its keys: ``"c"`` latent channels; ``"2 c"`` those
            of a head with learned variance; ``"c 2 2"`` those of a latent packed two by two. A key whose
            value is None follows another one.
        sample_pattern: how axis 1 of the model's output factors.
        tokens: rows and columns of tokens in the dummy latent, not square so that a swap shows;
            a power of two, so that chunked feed-forwards divide it.
    """

    inputs: tuple[ChannelPlace, ...]
    outputs: tuple[ChannelPlace, ...]
    dummy_inputs: DummyInputs
    sizes: Mapping[str, str | int] = field(default_factory=lambda: {"p": "patch_size"})
    counts: Mapping[str, str] = field(default_factory=lambda: {"in_channels": "c", "out_channels": "c"})
    sample_pattern: str = "c"
    tokens: tuple[int, int] = (2, 4)

    def __post_init__(self) -> None:
        if not self.inputs or not self.outputs:
            raise WarmStartError("a description needs at least one input place and one output place")

    @property
    def places(self) -> tuple[ChannelPlace, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def resolve_sizes(self, transformer: ModelMixin) -> dict[str, int]:
        """The numbers behind the letters, for this transformer."""
        return {
            letter: size if isinstance(size, int) else int(transformer.config[size])
            for letter, size in self.sizes.items()
        }

    def dummy_grid(self, transformer: ModelMixin) -> tuple[int, int]:
        """Height and width of the dummy latent."""
        patch = self.resolve_sizes(transformer).get("p", 1)
        return self.tokens[0] * patch, self.tokens[1] * patch


_DESCRIPTIONS: dict[str, ChannelDescription] = {}


def describe(class_name: str, description: ChannelDescription) -> None:
    """Teach the warm start a transformer class; its subclasses are known with it.

    Raises:
        WarmStartError: the class has another description already.
    """
    if _DESCRIPTIONS.setdefault(class_name, description) is not description:
        raise WarmStartError(f"{class_name} is described already; a class has one description")


def description_of(transformer: ModelMixin) -> ChannelDescription:
    """The description of the transformer's class, or of the nearest class it derives from.

    Raises:
        WarmStartError: nobody described it; says how to.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in _DESCRIPTIONS:
            return _DESCRIPTIONS[cls.__name__]
    name = type(transformer).__name__
    raise WarmStartError(
        f"{name} is not described: davae does not know where its latent channels sit. Known are "
        f"{', '.join(sorted(_DESCRIPTIONS))}. Describe it with davae.warm_start.describe('{name}', "
        "ChannelDescription(inputs=input_layer('...'), outputs=output_layer('...', 'p p c'), "
        "dummy_inputs=...)); the self-check then says whether the description is right"
    )


def widen_axis(tensor: Tensor, place: ChannelPlace, sizes: Mapping[str, int], layout: LatentLayout) -> Tensor:
    """Insert zeros for the detail channels behind the base channels on the place's axis.

    With pattern ``"p p c"``, ``[p * p * C, ...]`` becomes ``[p * p * (C + D), ...]``.

    Raises:
        WarmStartError: the axis does not factor as the pattern says.
    """
    factored, channel_axis = _factor(tensor, place, sizes, layout.base_channels)
    shape = list(factored.shape)
    shape[channel_axis] = layout.detail_channels
    widened = torch.cat([factored, factored.new_zeros(shape)], dim=channel_axis)
    return widened.flatten(place.axis, place.axis + len(place.pattern.split()) - 1)


def split_axis(
    tensor: Tensor, place: ChannelPlace, sizes: Mapping[str, int], layout: LatentLayout
) -> tuple[Tensor, Tensor]:
    """The inverse: what belongs to base channels (in the original's shape) and what to detail channels.

    Raises:
        WarmStartError: the axis does not factor as the pattern says.
    """
    factored, channel_axis = _factor(tensor, place, sizes, layout.channels)
    base, detail = factored.split([layout.base_channels, layout.detail_channels], dim=channel_axis)
    last = place.axis + len(place.pattern.split()) - 1
    return base.flatten(place.axis, last), detail.flatten(place.axis, last)


def _factor(
    tensor: Tensor, place: ChannelPlace, sizes: Mapping[str, int], channels: int
) -> tuple[Tensor, int]:
    factors = pattern_factors(place.pattern, sizes, channels)
    if place.axis >= tensor.ndim or tensor.shape[place.axis] != math.prod(factors):
        raise WarmStartError(
            f"{place.parameter} has shape {tuple(tensor.shape)}, but '{place.pattern}' on axis {place.axis} "
            f"with {channels} channels asks for {' x '.join(map(str, factors))} = {math.prod(factors)} there"
        )
    return tensor.unflatten(place.axis, factors), place.axis + place.pattern.split().index("c")


def pattern_factors(pattern: str, sizes: Mapping[str, int], channels: int) -> list[int]:
    """The numbers of a pattern: ``"p p c"`` with p = 2 and 16 channels is [2, 2, 16].

    Raises:
        WarmStartError: a letter that `sizes` does not name.
    """
    names = pattern.split()
    unknown = [name for name in names if name != "c" and name not in sizes and not name.isdigit()]
    if unknown:
        raise WarmStartError(
            f"pattern '{pattern}' uses {', '.join(unknown)}, which the description's sizes do not name"
        )
    return [channels if name == "c" else int(name) if name.isdigit() else sizes[name] for name in names]


def layer_names(places: Sequence[ChannelPlace]) -> tuple[str, ...]:
    """The modules that own the places, each once, in order."""
    return tuple(dict.fromkeys(place.layer for place in places))
