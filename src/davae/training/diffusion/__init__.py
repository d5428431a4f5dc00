"""The diffusion stage, for every family of pipelines."""

from davae.training.diffusion.class_map import ClassMap
from davae.training.diffusion.noise import DdpmProcess, FlowProcess, NoiseProcess, NoisySample, noise_process
from davae.training.diffusion.objective import DiffusionObjective
from davae.training.diffusion.prompts import PromptEmbeddings
from davae.training.diffusion.stage import DiffusionStage
from davae.training.diffusion.tuning import lora_config, select_trained
from davae.training.diffusion.validation import generate_classes, generate_prompts, held_out_loss

__all__ = [
    "ClassMap",
    "DdpmProcess",
    "DiffusionObjective",
    "DiffusionStage",
    "FlowProcess",
    "NoiseProcess",
    "NoisySample",
    "PromptEmbeddings",
    "generate_classes",
    "generate_prompts",
    "held_out_loss",
    "lora_config",
    "noise_process",
    "select_trained",
]
