"""What every section of a recipe is built from: strict models, common types, and the mark of a resumable change."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _MayChange:
    """Type of :data:`MAY_CHANGE`."""


MAY_CHANGE: Final = _MayChange()
"""Marks a setting that says how steps are computed and kept, not what is learnt. A run may continue with another
value, so that it fits another machine, another number of processes, or less memory:
``workers: Annotated[int, MAY_CHANGE]``."""


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change after reading.

    The docstring below a field is its description: the tables of docs/training.md are made of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
