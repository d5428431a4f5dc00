"""What an ablation's file may say."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from davae.training.settings import Positive, Section


class AblationRecipe(Section):
    """Variants of one upgrade recipe: the same data, steps and seeds, some settings changed."""

    kind: Literal["ablation"]
    description: str
    recipe: str
    """The upgrade recipe that every variant starts from, by name or file."""
    overrides: tuple[str, ...] = ()
    """``section.key=value``, for every variant."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    samples: Positive = 192
    """Images generated for the generation metrics, classes in turn."""
    features: str | None = None
    """A network for distances of features, as ``davae evaluate generation --features`` takes it."""
    variants: Annotated[dict[str, list[str]], Field(min_length=1)]
    """Name to the overrides that make the variant. The first is what the others are compared with."""
