"""Class-conditional pipelines: the project's own flow model, and DiT with DDPM noise prediction."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import DavaeError
from davae.pipelines.class_conditional import predict_velocity
from davae.pipelines.families.family import Conditioning, PipelineFamily, register_family


class ClassFamily(PipelineFamily):
    """A "prompt" is the name of a class; the empty one is the label of no class.

    Attributes:
        has_guidance_interval: the pipeline can guide a part of the steps.
        takes_names: the pipeline's call takes names of classes, not numbers alone.
    """

    conditioned_on = "class"
    text_length = 1
    has_guidance_interval: ClassVar[bool] = False
    takes_names: ClassVar[bool] = False

    def null_label(self, pipe: DiffusionPipeline) -> int:
        """The label of no class."""
        raise NotImplementedError

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
        """Images of class numbers at the trained size, ``[B, 3, H, W]`` in [-1, 1], one generator an image.

        Raises:
            DavaeError: an interval, and a pipeline that guides always.
        """
        arguments: dict[str, Any] = {"class_labels": list(labels), "guidance_scale": guidance_scale}
        if self.has_guidance_interval:
            arguments["guidance_interval"] = guidance_interval
        self.check_interval(guidance_interval)
        return self._images(pipe, num_inference_steps, generators, arguments)

    def check_interval(self, guidance_interval: tuple[float, float]) -> None:
        """Whether the pipeline can guide in a part of the steps alone.

        Raises:
            DavaeError: it cannot, and is asked to.
        """
        if not self.has_guidance_interval and tuple(guidance_interval) != (0.0, 1.0):
            raise DavaeError(f"{self.name} guides at every step: leave sample.guidance_interval at [0, 1]")

    def _call_arguments(
        self, prompts: list[str], height: int, width: int, guidance_scale: float, max_length: int | None
    ) -> dict[str, Any]:
        raise DavaeError(f"{self.name} makes images of classes: use sample_labels")


class ClassConditional(ClassFamily):
    """LightningDiT, whose sign and time :func:`predict_velocity` turns.

    Trained with plain levels of noise whatever its sampler's shift, as LightningDiT is.
    """

    pipelines = ("ClassConditionalPipeline",)
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "modulation")
    has_guidance_interval = True
    takes_names = True

    def null_label(self, pipe: DiffusionPipeline) -> int:
        """The number after the last class."""
        return int(pipe.transformer.null_label)

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return predict_velocity(transformer, noisy, level, conditioning["class_labels"])

    def timestep_shift(self, pipe: DiffusionPipeline, tokens: int) -> float:
        """No shift: 1."""
        return 1.0


class DiT(ClassFamily):
    """DiT: its sampler passes over the learned variance; labels are dropped by the transformer itself."""

    pipelines = ("DiTPipeline",)
    kind = "ddpm"
    reads_shift = False
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    def null_label(self, pipe: DiffusionPipeline) -> int:
        """The number after the last class."""
        return int(pipe.transformer.config.num_embeds_ada_norm)

    def _predict(
        self, transformer: ModelMixin, noisy: Tensor, level: Tensor, conditioning: Conditioning, guidance: float
    ) -> Tensor:
        return transformer(noisy, timestep=level, class_labels=conditioning["class_labels"]).sample


def _number(pipe: DiffusionPipeline, name: str) -> int:
    if name not in pipe.labels:
        raise DavaeError(f"the pipeline knows no class '{name}'")
    return int(pipe.labels[name])


register_family(ClassConditional())
register_family(DiT())
