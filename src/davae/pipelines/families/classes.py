"""Class-conditional pipelines: LightningDiT with flow matching, and DiT with DDPM noise prediction."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.pipelines.class_conditional import predict_velocity
from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class ClassFamily(PipelineFamily):
    """A "prompt" is the name of a class; an empty one means no class.

    Attributes:
        has_guidance_interval: the pipeline can limit guidance to a part of the steps.
        takes_names: the pipeline's call takes names of classes as well as numbers.
    """

    conditioned_on = "class"
    text_length = 1
    has_guidance_interval: ClassVar[bool] = False
    takes_names: ClassVar[bool] = False

    def null_label(self, pipe: DiffusionPipeline) -> int:
        """The label that means no class."""
        raise NotImplementedError

    def drop_labels(self, transformer: ModelMixin, labels: Tensor) -> Tensor:
        """Labels ``[B]``, of which each becomes the null label with the probability that the transformer names."""
        raise NotImplementedError

    def keep_labels(self, transformer: ModelMixin) -> None:
        """Keep the transformer from dropping labels by itself, until ``train()`` is called on it the next time."""

    def _encode(self, pipe: DiffusionPipeline, prompts: list[str], length: int, empty: bool) -> dict[str, Tensor]:
        numbers = [self.null_label(pipe) if empty else _number(pipe, name) for name in prompts]
        return {"class_labels": torch.tensor(numbers, device=pipe.transformer.device)}

    def sample_labels(
        self,
        pipe: DiffusionPipeline,
        labels: Sequence[int],
        *,
        num_inference_steps: int,
        guidance_scale: float,
        generators: Sequence[torch.Generator],
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> Tensor:
        """Images of class numbers at the trained size, ``[B, 3, H, W]`` in [-1, 1], with one generator per image.

        Raises:
            DavaeError: an interval is given, and the pipeline guides at every step.
        """
        arguments: dict[str, Any] = {"class_labels": list(labels), "guidance_scale": guidance_scale}
        if self.has_guidance_interval:
            arguments["guidance_interval"] = guidance_interval
        self.check_interval(guidance_interval)
        return self._images(pipe, num_inference_steps, generators, arguments)

    def check_interval(self, guidance_interval: tuple[float, float]) -> None:
        """Check that the pipeline supports this interval of ``t = 1 - sigma``.

        Raises:
            DavaeError: it is not [0, 1], and the pipeline guides at every step.
        """
        if not self.has_guidance_interval and tuple(guidance_interval) != (0.0, 1.0):
            raise DavaeError(f"{self.name} guides at every step: leave sample.guidance_interval at [0, 1]")

    def _call_arguments(
        self, prompts: list[str], height: int, width: int, guidance_scale: float, max_length: int | None
    ) -> dict[str, Any]:
        raise DavaeError(f"{self.name} makes images of classes: use sample_labels")


class ClassConditional(ClassFamily):
    """LightningDiT; :func:`predict_velocity` converts its sign and time.

    Trained without a timestep shift, whatever the shift of its sampler, as the original LightningDiT is.
    """

    pipelines = ("ClassConditionalPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "modulation")
    has_guidance_interval = True
    takes_names = True

    def null_label(self, pipe: DiffusionPipeline) -> int:
        """The number after that of the last class."""
        return int(pipe.transformer.null_label)

    def drop_labels(self, transformer: ModelMixin, labels: Tensor) -> Tensor:
        """As LightningDiT's own method does; a class without one keeps all labels, or drops them by itself."""
        drop = getattr(transformer, "drop_labels", None)
        return labels if drop is None else drop(labels)

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return predict_velocity(transformer, noisy, level, conditioning["class_labels"])

    def timestep_shift(self, pipe: DiffusionPipeline, tokens: int) -> float:
        """No shift: 1."""
        return 1.0


class DiT(ClassFamily):
    """DiT: its sampler ignores the learned variance.

    In train mode diffusers' class drops labels in every block anew; here they are dropped once for all blocks, as in
    the original training.
    """

    pipelines = ("DiTPipeline",)
    kind = "ddpm"
    reads_shift = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def null_label(self, pipe: DiffusionPipeline) -> int:
        """The number after that of the last class."""
        return int(pipe.transformer.config.num_embeds_ada_norm)

    def drop_labels(self, transformer: ModelMixin, labels: Tensor) -> Tensor:
        """With the probability of its label embeddings, 0.1."""
        embedding = next(_label_embeddings(transformer), None)
        return labels if embedding is None or embedding.dropout_prob <= 0 else embedding.token_drop(labels)

    def keep_labels(self, transformer: ModelMixin) -> None:
        """Put the label embeddings in eval mode."""
        for embedding in _label_embeddings(transformer):
            embedding.eval()

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return transformer(noisy, timestep=level, class_labels=conditioning["class_labels"]).sample


def _label_embeddings(transformer: nn.Module) -> Iterator[LabelEmbedding]:
    return (part for part in transformer.modules() if isinstance(part, LabelEmbedding))


def _number(pipe: DiffusionPipeline, name: str) -> int:
    if name not in pipe.labels:
        raise DavaeError(f"the pipeline has no class '{name}'")
    return int(pipe.labels[name])


register_family(ClassConditional())
register_family(DiT())
