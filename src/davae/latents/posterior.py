"""The Kullback-Leibler term of a diagonal Gaussian posterior against the standard normal."""

from __future__ import annotations

from torch import Tensor

from davae.choices import Reduction
from davae.errors import DavaeError


def gaussian_kl(mean: Tensor, logvar: Tensor, *, reduction: Reduction = "sum") -> Tensor:
    """KL divergence of ``N(mean, exp(logvar))`` from ``N(0, 1)``, computed in float32.

    Args:
        mean, logvar: ``[B, D, h, w]``.
        reduction: ``"sum"`` is the divergence itself, ``1/2 sum(mean^2 + var - 1 - logvar)`` over a sample,
            then the mean over the batch. ``"mean"`` is the mean over all elements *without* the factor 1/2,
            as the published ImageNet training has it.

    Returns:
        Scalar.

    Raises:
        DavaeError: an unknown reduction.
    """
    mean, logvar = mean.float(), logvar.float()
    terms = mean.square() + logvar.exp() - 1.0 - logvar  # [B, D, h, w]
    if reduction == "mean":
        return terms.mean()
    if reduction == "sum":
        return 0.5 * terms.flatten(1).sum(dim=1).mean()
    raise DavaeError(f"unknown KL reduction '{reduction}': use 'mean' or 'sum'")
