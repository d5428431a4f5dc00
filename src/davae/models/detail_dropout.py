"""Dropout of whole detail latents, so that the joint decoder can also do without them."""

from __future__ import annotations

from torch import Tensor


def detail_dropout_factor(uniform: Tensor, probability: float) -> Tensor:
    """Factor on each sample's detail latent: 0 with ``probability``, else ``1 / (1 - probability)``.

    Args:
        uniform: numbers in [0, 1), ``[B]``; a sample is kept where its number is below ``1 - probability``.
        probability: in [0, 1).
    """
    keep = 1.0 - probability
    return (uniform < keep).to(uniform.dtype) / keep
