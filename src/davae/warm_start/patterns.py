"""The factors of one axis of a tensor: latent channels and everything else.

An axis rarely holds latent channels alone: a head that predicts a patch of ``p x p`` positions has
``p * p * C`` features. A pattern names the factors of an axis, slowest first:

* ``"c"`` channels alone, ``"p p c"`` a patch with the channel fastest, ``"c p p"`` with the channel slowest,
* ``"2 c"`` mean and variance, ``"c 2 2"`` a latent packed two by two,
* ``"c | 1 | c"`` side by side: a latent, one mask channel, another latent,
* ``"p p ( c | 1 | c )"`` the same within each position of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from davae.errors import WarmStartError
from davae.latents import LatentLayout


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: ``outer ( segment | segment )``.

    Attributes:
        outer: factors around the concatenation, slowest first.
        segments: the concatenated parts, each as its factors.
    """

    outer: tuple[str, ...]
    segments: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """``"p p ( c | 1 )"`` has outer (p, p) and segments (c), (1)."""
        outer, opened, inner = text.partition("(")
        if not opened:
            outer, inner = "", text
        segments = inner.replace(")", "").split("|")
        return cls(tuple(outer.split()), tuple(tuple(segment.split()) for segment in segments))

    def substitute(self, values: Mapping[str, str]) -> Pattern:
        """Replace names by patterns; a concatenation in place of a factor is multiplied out."""
        segments: list[tuple[str, ...]] = []
        outer = self.outer
        for segment in self.segments:
            named = [factor for factor in segment if factor in values]
            if not named:
                segments.append(segment)
                continue
            at = segment.index(named[0])
            inner = Pattern.parse(values[named[0]])
            before, behind = segment[:at] + inner.outer, segment[at + 1 :]
            if len(inner.segments) == 1:
                segments.append((*before, *inner.segments[0], *behind))
            else:  # [a, b] x s = [a x s, b x s], but p x [a, b] stays around it
                outer = (*outer, *before)
                segments += [(*part, *behind) for part in inner.segments]
        return Pattern(outer, tuple(segments))

    def __str__(self) -> str:
        inner = " | ".join(" ".join(segment) for segment in self.segments)
        return f"{' '.join(self.outer)} ( {inner} )" if self.outer else inner

    def factors(self, sizes: Mapping[str, int], channels: int) -> tuple[int, list[list[int]]]:
        """The number of outer positions, and the factors of each segment.

        Raises:
            WarmStartError: a letter that `sizes` does not define.
        """
        named = (*self.outer, *(factor for segment in self.segments for factor in segment))
        unknown = [name for name in named if name != "c" and name not in sizes and not name.isdigit()]
        if unknown:
            raise WarmStartError(
                f"pattern '{self}' uses {', '.join(unknown)}, which the description's sizes do not define"
            )

        def number(name: str) -> int:
            return channels if name == "c" else int(name) if name.isdigit() else sizes[name]

        outer = math.prod(number(name) for name in self.outer)
        return outer, [[number(name) for name in segment] for segment in self.segments]


def pattern_count(pattern: str, sizes: Mapping[str, int], channels: int) -> int:
    """Number of features on an axis: ``"p p c | 1"`` with p = 2 and 16 channels gives 65.

    Raises:
        WarmStartError: a letter that `sizes` does not define.
    """
    outer, segments = Pattern.parse(pattern).factors(sizes, channels)
    return outer * sum(map(math.prod, segments))


def widen_axis(
    tensor: Tensor, axis: int, pattern: str, sizes: Mapping[str, int], layout: LatentLayout, *, name: str
) -> Tensor:
    """Insert zeros for the detail channels after the base channels on an axis.

    With pattern ``"p p c"``, ``[p * p * C, ...]`` becomes ``[p * p * (C + D), ...]``.

    Args:
        tensor: has base channels only.
        axis: the axis of the channels.
        pattern: the factors of the axis.
        sizes: the values of the pattern's letters.
        layout: base and detail channels.
        name: the tensor's name in errors.

    Raises:
        WarmStartError: the axis does not factor as the pattern says.
    """
    parts = []
    for part, channel_axis in _parts(tensor, axis, pattern, sizes, layout.base_channels, name):
        if channel_axis is not None:
            shape = list(part.shape)
            shape[channel_axis] = layout.detail_channels
            part = torch.cat([part, part.new_zeros(shape)], dim=channel_axis)
        parts.append(part)
    return _together(parts, tensor, axis)


def split_axis(
    tensor: Tensor, axis: int, pattern: str, sizes: Mapping[str, int], layout: LatentLayout, *, name: str
) -> tuple[Tensor, Tensor]:
    """The inverse of `widen_axis`: the part of the base channels, in the original shape, and that of the details.

    Features that are not latent channels (a mask) belong to the base part.

    Raises:
        WarmStartError: the axis does not factor as the pattern says.
    """
    kept, new = [], []
    for part, channel_axis in _parts(tensor, axis, pattern, sizes, layout.channels, name):
        if channel_axis is None:
            kept.append(part)
        else:
            sections = [layout.base_channels, layout.detail_channels]
            base, detail = part.split(sections, dim=channel_axis)
            kept.append(base)
            new.append(detail)
    return _together(kept, tensor, axis), _together(new, tensor, axis)


def _parts(
    tensor: Tensor, axis: int, pattern: str, sizes: Mapping[str, int], channels: int, name: str
) -> Iterator[tuple[Tensor, int | None]]:
    """Each segment as [..., outer, *factors, ...], with its axis of channels, None if it has none."""
    parsed = Pattern.parse(pattern)
    outer, factors = parsed.factors(sizes, channels)
    widths = [math.prod(numbers) for numbers in factors]
    if axis >= tensor.ndim or tensor.shape[axis] != outer * sum(widths):
        message = " + ".join(" x ".join(map(str, numbers)) for numbers in factors)
        message = f"{outer} x ({message})" if parsed.outer else message
        raise WarmStartError(
            f"{name} has shape {tuple(tensor.shape)}, but '{pattern}' on axis {axis} "
            f"with {channels} channels needs {message} = {outer * sum(widths)} there"
        )
    split = tensor.unflatten(axis, (outer, sum(widths))).split(widths, dim=axis + 1)
    for part, segment, numbers in zip(split, parsed.segments, factors, strict=True):
        at = axis + 1 + segment.index("c") if "c" in segment else None
        yield part.unflatten(axis + 1, numbers), at


def _together(parts: list[Tensor], tensor: Tensor, axis: int) -> Tensor:
    """The segments concatenated and flattened to one axis again."""
    behind = tensor.ndim - axis - 1
    flat = [part.flatten(axis + 1, part.ndim - 1 - behind) for part in parts]
    return torch.cat(flat, dim=axis + 1).flatten(axis, axis + 1)
