"""What the transformer is conditioned on: the pipeline's labels, or embeddings of captions."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.pipelines.families import ClassFamily, PipelineFamily, family_of
from davae.runtime.processes import gathered, share

logger = logging.getLogger(__name__)
_BATCH = 16  # captions encoded together


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
            logger.info("the pipeline knows no class names: its %d classes are taken in their order", self.null)
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


class PromptEmbeddings:
    """Embeddings of captions in memory, as the family's pipeline makes them; each process encodes its share.

    Args:
        family: how prompts are encoded.
        pipe: its encoders are used here and not afterwards.
        captions: what will be asked for; each distinct one is encoded once.
        device: where the encoders run; they go back to the CPU.
        max_length: tokens a prompt is cut or padded to.
    """

    def __init__(
        self,
        family: PipelineFamily,
        pipe: DiffusionPipeline,
        captions: Iterable[str],
        device: torch.device,
        max_length: int | None = None,
    ) -> None:
        distinct = list(dict.fromkeys(["", *captions]))
        logger.info("encoding %d captions", len(distinct))
        family.tell_cut_prompts(pipe, distinct, max_length)
        move_text_encoders(pipe, device)
        mine = [distinct[i] for i in share(len(distinct))]
        embeddings: list[dict[str, Tensor]] = []
        for first in range(0, len(mine), _BATCH):
            part = mine[first : first + _BATCH]
            encoded = {
                name: value.cpu() for name, value in family.encode_prompts(pipe, part, max_length=max_length).items()
            }
            embeddings += [{name: value[i].clone() for name, value in encoded.items()} for i in range(len(part))]
        self.kept = dict(zip(distinct, gathered(embeddings, len(distinct)), strict=True))
        move_text_encoders(pipe, torch.device("cpu"))

    @property
    def unconditional(self) -> dict[str, Tensor]:
        """The empty prompt's conditioning, first axis 1."""
        return {name: value[None] for name, value in self.kept[""].items()}

    def prepare(self, item: dict[str, Any]) -> dict[str, Any]:
        """An item with the ``conditioning`` of its caption.

        Raises:
            DavaeError: the caption is not one of those that were asked for.
        """
        known = self.kept.get(item["caption"])
        if known is None:
            raise DavaeError(
                f"the caption of {item['id']} came after the training had begun: {item['caption'][:60]!r}. The same "
                "command continues with it from the last checkpoint"
            )
        return {**item, "conditioning": known}


def move_text_encoders(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Move the pipeline's text encoders; everything else stays."""
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            part.to(device)
