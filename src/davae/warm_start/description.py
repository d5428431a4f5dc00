"""Where latent channels are in the weights of a transformer.

Latent channels enter through an axis of an input layer and leave through an axis of an output layer; a
pattern (see `davae.warm_start.patterns`) gives the factors of that axis. A class is described once; everything
that widens or checks it uses the description.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import WarmStartError
from davae.latents import LatentLayout
from davae.warm_start.patterns import Pattern, pattern_count, split_axis, widen_axis


class DummyInputs(Protocol):
    """Builds the keyword arguments of a transformer's ``forward``.

    The latent [B, C, h, w] has the autoencoder's channels, so a class that takes packed latents packs
    it here. The other inputs come from the generator: the same seed must give the same values for any
    number of channels. A function may also take ``text_tokens``, for callers that need another text length.
    """

    def __call__(
        self, transformer: ModelMixin, latent: Tensor, generator: torch.Generator, **options: Any
    ) -> dict[str, Any]:
        """Keyword arguments of ``forward``."""


@dataclass(frozen=True)
class ChannelPlace:
    """One axis of one parameter that holds latent channels.

    Attributes:
        parameter: dotted name, as in ``named_parameters()``.
        axis: the axis of the channels.
        pattern: the factors of the axis, slowest first. Exactly one factor of a segment is ``c`` or the name of a
            counted configuration key, which is replaced by its own pattern (``"p p out_channels"``); a
            segment of numbers alone means features that are not latent channels (a mask).
        optional: the parameter may be absent (a bias).
    """

    parameter: str
    axis: int
    pattern: str = "c"
    optional: bool = False

    def __post_init__(self) -> None:
        counts = [sum(map(_is_channel, segment)) for segment in Pattern.parse(self.pattern).segments]
        if max(counts) != 1:
            raise WarmStartError(f"{self.parameter}: pattern '{self.pattern}' must name the channel 'c' once")

    @property
    def layer(self) -> str:
        """The module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    def widen(self, tensor: Tensor, sizes: Mapping[str, int], layout: LatentLayout) -> Tensor:
        """See `davae.warm_start.patterns.widen_axis`."""
        return widen_axis(tensor, self.axis, self.pattern, sizes, layout, name=self.parameter)

    def split(self, tensor: Tensor, sizes: Mapping[str, int], layout: LatentLayout) -> tuple[Tensor, Tensor]:
        """See `davae.warm_start.patterns.split_axis`."""
        return split_axis(tensor, self.axis, self.pattern, sizes, layout, name=self.parameter)


def _is_channel(factor: str) -> bool:
    return factor == "c" or (len(factor) > 1 and not factor.isdigit())


def input_layer(name: str, pattern: str = "c") -> tuple[ChannelPlace, ...]:
    """Places of a convolution or linear layer that takes latent channels; its bias has no such axis."""
    return (ChannelPlace(f"{name}.weight", 1, pattern),)


def output_layer(name: str, pattern: str = "c") -> tuple[ChannelPlace, ...]:
    """Places of a convolution or linear layer that gives latent channels: rows of its weight and its bias."""
    return (ChannelPlace(f"{name}.weight", 0, pattern), ChannelPlace(f"{name}.bias", 0, pattern, optional=True))


@dataclass(frozen=True)
class ChannelDescription:
    """Everything the warm start needs to know about a transformer class.

    Attributes:
        inputs: places through which latent channels enter.
        outputs: places through which they leave; empty for a ControlNet.
        dummy_inputs: builds small inputs for the self-check.
        sizes: the letters of the patterns: a configuration key to read, or a number.
        counts: what the configuration counts under each of its keys: ``"c"`` latent channels; ``"2 c"`` those
            of a head with learned variance; ``"c 2 2"`` those of a latent packed two by two. For a class
            that is used in several ways, a tuple, of which the first that gives the number found is taken.
            A key whose value is None follows ``in_channels``.
        sample_pattern: the factors of the channel axis of the model's output.
        sample_axis: the channel axis of the model's output.
        tokens: rows and columns of tokens in the dummy latent; not square, so that a transposition is noticed,
            and powers of two, so that chunked feed-forwards divide them.
        packing: rows (and columns) of the latent that the pipeline packs into one position.
        passes: arguments to add to the dummy inputs, one set for each path that the forward can take
            through the input and output layers; the self-check runs all of them.
        residuals: for a ControlNet, the lists of layers that give its residuals, whose inputs must not change.
        source: "described" by hand, or "probed".
    """

    inputs: tuple[ChannelPlace, ...]
    outputs: tuple[ChannelPlace, ...]
    dummy_inputs: DummyInputs
    sizes: Mapping[str, str | int] = field(default_factory=lambda: {"p": "patch_size"})
    counts: Mapping[str, str | tuple[str, ...]] = field(
        default_factory=lambda: {"in_channels": "c", "out_channels": "c"}
    )
    sample_pattern: str = "c"
    sample_axis: int = 1
    tokens: tuple[int, int] = (2, 4)
    packing: int = 1
    passes: tuple[Mapping[str, Any], ...] = ({},)
    residuals: tuple[str, ...] = ()
    source: Literal["described", "probed"] = "described"

    def __post_init__(self) -> None:
        if not self.inputs or not (self.outputs or self.residuals):
            raise WarmStartError("a description needs at least one input place and one output place")

    @property
    def places(self) -> tuple[ChannelPlace, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    def resolve_sizes(self, transformer: ModelMixin) -> dict[str, int]:
        """The value of each letter in the patterns, for this transformer."""
        return {
            letter: size if isinstance(size, int) else int(transformer.config[size])
            for letter, size in self.sizes.items()
        }

    def fitted(self, transformer: ModelMixin, channels: int) -> ChannelDescription:
        """This description with one pattern for each key and place, for a transformer with `channels`.

        Raises:
            WarmStartError: the configuration's counts do not fit that many latent channels.
        """
        counts: dict[str, str] = {}
        for key in self.counts:
            found = transformer.config[key]
            if found is None and "in_channels" in counts:
                counts[key] = counts["in_channels"]
            elif found is not None:
                counts[key] = self._fit(transformer, key, found, channels)

        def resolved(pattern: str) -> str:
            return str(Pattern.parse(pattern).substitute(counts))

        def places(given: tuple[ChannelPlace, ...]) -> tuple[ChannelPlace, ...]:
            return tuple(dataclasses.replace(place, pattern=resolved(place.pattern)) for place in given)

        return dataclasses.replace(
            self,
            inputs=places(self.inputs),
            outputs=places(self.outputs),
            counts=counts,
            sample_pattern=resolved(self.sample_pattern),
        )

    def _fit(self, transformer: ModelMixin, key: str, found: int, channels: int) -> str:
        given, sizes = self.counts[key], self.resolve_sizes(transformer)
        patterns = (given,) if isinstance(given, str) else given
        expected = {pattern: pattern_count(pattern, sizes, channels) for pattern in patterns}
        for pattern, count in expected.items():
            if count == found:
                return pattern
        ways = ", or ".join(f"'{pattern}': {count}" for pattern, count in expected.items())
        counted = f" (counted as {ways})" if set(expected.values()) != {channels} else ""
        raise WarmStartError(
            f"{type(transformer).__name__} has config.{key} = {found}, but the autoencoder's base latent "
            f"has {channels} channels{counted}: they do not fit together (layers "
            f"{', '.join(layer_names(self.places))})"
        )

    def dummy_grid(self, transformer: ModelMixin) -> tuple[int, int]:
        """Height and width of the dummy latent, in latent positions."""
        side = self.resolve_sizes(transformer).get("p", 1) * self.packing
        return self.tokens[0] * side, self.tokens[1] * side


def layer_names(places: Sequence[ChannelPlace]) -> tuple[str, ...]:
    """The modules that own the places, each once, in order."""
    return tuple(dict.fromkeys(place.layer for place in places))
