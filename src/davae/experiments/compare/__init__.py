"""Comparison of autoencoders on the same images, alone and as latent spaces of the same diffusion transformer."""

from davae.experiments.compare.autoencoders import AutoencoderScore, Candidate, open_candidates, score_autoencoders
from davae.experiments.compare.comparison import Comparison, compare_autoencoders
from davae.experiments.compare.diffusion import DiffusionOptions, DiffusionScore, score_diffusion

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
