"""Autoencoders side by side on the same images, alone and under the same diffusion transformer."""

from davae.training.compare.autoencoders import open_contenders, score_autoencoders
from davae.training.compare.comparison import Comparison, compare_autoencoders
from davae.training.compare.trial import DiffusionOptions

__all__ = ["Comparison", "DiffusionOptions", "compare_autoencoders", "open_contenders", "score_autoencoders"]
