"""The diffusion stage, for every family of pipelines.

Read in this order: `train`, `stage`, `objective`, then `noise`, `loss`, `detail_schedule` in `davae.diffusion`.
"""

from davae.training.diffusion.conditioning import ClassMap, PromptEmbeddings
from davae.training.diffusion.objective import DiffusionObjective, noise_process
from davae.training.diffusion.stage import DiffusionStage
from davae.training.diffusion.tuning import select_trained
from davae.training.diffusion.validation import generate_classes

__all__ = [
    "ClassMap",
    "DiffusionObjective",
    "DiffusionStage",
    "PromptEmbeddings",
    "generate_classes",
    "noise_process",
    "select_trained",
]
