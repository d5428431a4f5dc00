"""From the labels of a data set to those of a pipeline."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from diffusers import DiffusionPipeline

from davae.errors import DavaeError
from davae.pipelines.families import ClassFamily, family_of

logger = logging.getLogger(__name__)


class ClassMap:
    """From the labels of a data set to those of a pipeline, by class name.

    Images of a class that the pipeline does not know, or without a class, are trained without a label, as
    classifier-free guidance does with a share of all images.

    Args:
        classes: the data set's class names.
        pipeline: a class-conditional pipeline; names its own classes in ``id2label``.
    """

    def __init__(self, classes: Sequence[str], pipeline: DiffusionPipeline) -> None:
        family = family_of(pipeline)
        if not isinstance(family, ClassFamily):
            raise DavaeError(f"{type(pipeline).__name__} is conditioned on {family.conditioned_on}")
        self.null = family.null_label(pipeline)
        self.numbers = [int(pipeline.labels.get(name, self.null)) for name in classes]
        if not pipeline.labels and len(classes) == self.null:  # converted checkpoints know no names
            logger.info(
                "the pipeline knows no class names: its %d classes are taken in their order", self.null
            )
            self.numbers = list(range(self.null))
        elif not pipeline.labels and classes:
            logger.warning(
                "the pipeline knows no class names, and the data set has %d of its %d classes: all images are trained "
                "without a label",
                len(classes),
                self.null,
            )
        unknown = [name for name, number in zip(classes, self.numbers) if number == self.null]
        if unknown and pipeline.labels:
            logger.warning(
                "the pipeline does not know %s%s: these images are trained without a label",
                ", ".join(unknown[:5]),
                f" and {len(unknown) - 5} more classes" if len(unknown) > 5 else "",
            )

    @property
    def known(self) -> list[int]:
        """The pipeline's labels that occur in the data set; "no class" where there is none."""
        return sorted(set(self.numbers) - {self.null}) or [self.null]

    def __call__(self, label: int) -> int:
        """The pipeline's label for a label of the data set (-1 is none)."""
        return self.null if label < 0 else self.numbers[label]

    def prepare(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item with the pipeline's label."""
        return {**item, "label": self(item["label"])}
