"""What the transformer is conditioned on: class labels of the pipeline, or embeddings of captions."""

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.pipelines.families import PROMPTS_TOGETHER, ClassFamily, PipelineFamily, family_of
from davae.runtime.processes import gathered, share

logger = logging.getLogger(__name__)


class ClassMap:
    """Maps the labels of a data set to those of a pipeline by class name.

    Images of a class that the pipeline does not know, or without a class, get the null label, as label dropout for
    classifier-free guidance does. A pipeline without class names takes the data set's classes in order if their
    numbers agree.

    Args:
        classes: the data set's class names.
        pipeline: a class-conditional pipeline, with the names of its classes in ``id2label``.

    Raises:
        DavaeError: the pipeline is not class-conditional.
    """

    def __init__(self, classes: Sequence[str], pipeline: DiffusionPipeline) -> None:
        family = family_of(pipeline)
        if not isinstance(family, ClassFamily):
            raise DavaeError(f"{type(pipeline).__name__} is conditioned on {family.conditioned_on}")
        self.null = family.null_label(pipeline)
        self.numbers = [int(pipeline.labels.get(name, self.null)) for name in classes]
        if not pipeline.labels and len(classes) == self.null:  # converted checkpoints know no names
            logger.info("the pipeline has no class names: its %d classes are matched by number", self.null)
            self.numbers = list(range(self.null))
        elif not pipeline.labels and classes:
            logger.warning(
                "the pipeline has no class names, and the data set has %d classes, not %d: all images are trained "
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
        """The pipeline's labels of the data set's classes, sorted; the null label alone if there are none."""
        return sorted(set(self.numbers) - {self.null}) or [self.null]

    def __call__(self, label: int) -> int:
        """The pipeline's label for a label of the data set (-1: no class)."""
        return self.null if label < 0 else self.numbers[label]

    def prepare(self, item: dict[str, Any]) -> dict[str, Any]:
        """The item, with the pipeline's label."""
        return {**item, "label": self(item["label"])}


class PromptEmbeddings:
    """Embeddings of captions, kept on the CPU, as the family's pipeline computes them; each process encodes its share.

    Args:
        family: how prompts are encoded.
        pipe: its text encoders are used, and moved to the CPU afterwards.
        captions: those that will be needed; each distinct one, and the empty prompt, is encoded once.
        device: where the encoders run.
        max_length: tokens that a prompt is cut or padded to; by default the family's.
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
        for first in range(0, len(mine), PROMPTS_TOGETHER):
            part = mine[first : first + PROMPTS_TOGETHER]
            encoded = {
                name: value.cpu() for name, value in family.encode_prompts(pipe, part, max_length=max_length).items()
            }
            embeddings += [{name: value[i].clone() for name, value in encoded.items()} for i in range(len(part))]
        self.kept = dict(zip(distinct, gathered(embeddings, len(distinct)), strict=True))
        move_text_encoders(pipe, torch.device("cpu"))

    @property
    def unconditional(self) -> dict[str, Tensor]:
        """The empty prompt's conditioning, as a batch of 1."""
        return {name: value[None] for name, value in self.kept[""].items()}

    def prepare(self, item: dict[str, Any]) -> dict[str, Any]:
        """The item, with the ``conditioning`` of its caption.

        Raises:
            DavaeError: the caption is not one of those encoded.
        """
        known = self.kept.get(item["caption"])
        if known is None:
            raise DavaeError(
                f"the caption of {item['id']} changed after the training had started: {item['caption'][:60]!r}. Run "
                "the same command again to continue with it from the last checkpoint"
            )
        return {**item, "conditioning": known}


def move_text_encoders(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Move the pipeline's text encoders, and nothing else."""
    for name, part in pipe.components.items():
        if name.startswith("text_encoder") and isinstance(part, nn.Module):
            part.to(device)
