"""Autoencoders side by side on the same images, alone and under the same diffusion transformer."""

from davae.training.compare.autoencoders import (
    AutoencoderScore,
    Contender,
    open_contenders,
    score_autoencoders,
)
from davae.training.compare.comparison import Comparison, compare_autoencoders
from davae.training.compare.diffusion import DiffusionOptions, DiffusionScore, score_diffusion

__all__ = [
    "AutoencoderScore",
    "Comparison",
    "Contender",
    "DiffusionOptions",
    "DiffusionScore",
    "compare_autoencoders",
    "open_contenders",
    "score_autoencoders",
    "score_diffusion",
]
