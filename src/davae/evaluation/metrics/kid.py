"""Kernel inception distance (KID, Binkowski et al. 2018): unbiased squared maximum mean discrepancy of features.

A Fréchet distance of few images is too large by an amount that depends on their number. KID is not, and is the
better measure below a few thousand images.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from davae.errors import DavaeError


class Kid(NamedTuple):
    """Mean and standard deviation over subsets; may be slightly below 0 for equal sets."""

    mean: float
    std: float
    subsets: int
    subset_size: int


def polynomial_kernel(a: Tensor, b: Tensor) -> Tensor:
    """``(a . b / F + 1)^3``, ``[n, F]`` and ``[m, F]`` to ``[n, m]``."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def unbiased_mmd(a: Tensor, b: Tensor) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of rows ``[n, F]`` and ``[m, F]``, n, m >= 2."""
    n, m = len(a), len(b)
    within_a, within_b = polynomial_kernel(a, a), polynomial_kernel(b, b)
    return float(
        (within_a.sum() - within_a.trace()) / (n * (n - 1))
        + (within_b.sum() - within_b.trace()) / (m * (m - 1))
        - 2 * polynomial_kernel(a, b).mean()
    )


def kid(a: Tensor, b: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 2020) -> Kid:
    """KID of two sets of features.

    Args:
        a, b: ``[N, F]`` and ``[M, F]``.
        subsets: random subsets whose values are averaged.
        subset_size: rows of each, at most N and M.
        seed: of the subsets, drawn as torch-fidelity draws them: the same seed gives its number.

    Raises:
        DavaeError: fewer rows than a subset has, or features of different networks.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise DavaeError(f"features must be rows of one length, got {list(a.shape)} and {list(b.shape)}")
    if not 2 <= subset_size <= min(len(a), len(b)):
        raise DavaeError(f"subsets of {subset_size} cannot be drawn from {len(a)} and {len(b)} images")
    random = np.random.RandomState(seed)  # as torch-fidelity draws
    a, b = a.double(), b.double()
    found = []
    for _ in range(subsets):
        part_a = a[torch.from_numpy(random.choice(len(a), subset_size, replace=False))]
        part_b = b[torch.from_numpy(random.choice(len(b), subset_size, replace=False))]
        found.append(unbiased_mmd(part_a, part_b))
    return Kid(float(np.mean(found)), float(np.std(found)), subsets, subset_size)
