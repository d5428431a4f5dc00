"""Autoencoders side by side on the same images, alone and under the same diffusion transformer."""

from davae.training.compare.autoencoders import (
    AutoencoderScore,
    Candidate,
    open_candidates,
    score_autoencoders,
)
from davae.training.compare.comparison import Comparison, compare_autoencoders
from davae.training.compare.diffusion import DiffusionScore, score_diffusion
from davae.training.compare.trial import DiffusionOptions

__all__ = [
    "AutoencoderScore",
    "Candidate",
    "Comparison",
    "DiffusionOptions",
    "DiffusionScore",
    "compare_autoencoders",
    "open_candidates",
    "score_autoencoders",
    "score_diffusion",
]
