"""The interface between a training and the loop: what is trained, on which data, how it is measured and exported."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.data import ItemDataset
from davae.recipes.loop import LoopSettings, OptimizerSettings


@dataclass
class TrainedModule:
    """A module with its own optimizer. ``module(batch, step)`` returns named scalar losses, among them ``total``.

    It makes its random draws under :func:`davae.training.loop.rng.drawing`, so that with several processes each sample
    has its own. Checkpoints hold the trained parameters and the running statistics of batch norms; other buffers count
    as constant.
    """

    name: str
    module: nn.Module
    optimizer: OptimizerSettings
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rates by exact parameter name, where they differ from the optimizer's."""
    gradient_masks: dict[str, Tensor] = field(default_factory=dict)
    """Boolean masks by exact parameter name; the gradient is set to zero where the mask is false."""
    rate_masks: dict[str, Tensor] = field(default_factory=dict)
    """Boolean masks by the names of ``learning_rates``; where the mask is false the rate is the optimizer's."""
    can_be_sharded: bool = True
    """False if ``module`` itself computes gradients with respect to single weights, which FSDP does not support."""

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that require gradients."""
        return [p for p in self.module.parameters() if p.requires_grad]


class Stage(ABC):
    """What the loop trains; see :func:`davae.training.loop.loop.train`."""

    name: str
    section: str = ""
    """The recipe's section that has ``loop``, for advice in messages."""
    loop: LoopSettings
    modules: list[TrainedModule]
    """The first is the model, which is averaged and validated; discriminators may follow."""
    dataset: ItemDataset
    """The training data; a custom stage may set any map-style torch data set of items."""
    workers: int = 0
    """Data loader processes."""
    timeout_s: float = 0.0
    """Seconds to wait for a batch of images; 0 waits forever."""
    facts: dict[str, Any] = {}  # replaced, never changed  # noqa: RUF012
    """Further entries of the run's ``environment.json``, such as the origin of the base's weights."""
    foundations: Mapping[str, str] = {}  # replaced, never changed
    """Hashes of the weights that the training was given, by a readable name."""
    measured_on: Sequence[ItemDataset] | None = None
    """The data sets that :meth:`validate` reads; if all are empty it is not called. ``None``: it is always called."""
    other_sections: Sequence[str] = ()
    """Sections of the recipe that only another stage reads."""

    can_recompute: bool = True
    """Whether the model supports ``loop.gradient_checkpointing``."""

    @property
    def can_measure(self) -> bool:
        """Whether there is anything to measure on."""
        return self.measured_on is None or any(len(images) for images in self.measured_on)

    @abstractmethod
    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """Measure the model on held-out images after ``step`` steps and write a picture into the folder ``samples``.

        Called in every process, each of which takes its share (see :mod:`davae.runtime.processes`); the first one
        writes the picture, and its metrics are logged.
        """

    def measure_latents(self) -> None:  # noqa: B027 (transformers have no latents of their own)
        """Set what the exported model needs to know of its latents. Called in every process before :meth:`export`."""

    @abstractmethod
    def export(self, out: Path) -> Path:
        """Write the result in diffusers format below ``out`` and return its folder."""

    def to(self, device: torch.device) -> None:  # noqa: B027 (most stages hold nothing else)
        """Move what the trained modules do not hold (frozen models) to the device."""
