"""Exact t-SNE (van der Maaten and Hinton 2008) for the few hundred points of a report."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from davae.errors import DavaeError

MAXIMUM_POINTS = 2000
_EXAGGERATION_STEPS = 250


def _affinities(squared: Tensor, perplexity: float) -> Tensor:
    """Symmetric joint probabilities [N, N]: Gaussian widths found by bisection so that every row has the
    entropy ``log(perplexity)``."""
    count = len(squared)
    itself = torch.eye(count, dtype=torch.bool)
    squared = squared / squared.mean().clamp_min(1e-300)
    low = torch.full((count, 1), -30.0, dtype=squared.dtype)  # log of the precision
    high = torch.full((count, 1), 30.0, dtype=squared.dtype)
    for _ in range(60):
        middle = (low + high) / 2
        logits = (-squared * middle.exp()).masked_fill(itself, -math.inf)
        log_p = logits.log_softmax(1)
        p = log_p.exp()
        entropy = -(p * log_p.masked_fill(itself, 0.0)).sum(1, keepdim=True)
        too_wide = entropy > math.log(perplexity)
        low = torch.where(too_wide, middle, low)
        high = torch.where(too_wide, high, middle)
    return ((p + p.T) / (2 * count)).clamp_min(1e-12)


def tsne(rows: Tensor, *, perplexity: float = 30.0, steps: int = 750, seed: int = 0) -> Tensor:
    """Lay rows out in the plane so that neighbours stay neighbours.

    Gradient descent on ``KL(P | Q)`` with momentum, per-coordinate gains and early exaggeration; starts from
    the two first columns (principal axes, when the rows come from PCA), so the layout is reproducible.

    Args:
        rows: [N, F].
        perplexity: effective number of neighbours, at most (N - 1) / 3.
        steps: gradient steps, of which the first 250 exaggerate P twelve times.
        seed: of the small noise that separates equal points.

    Returns:
        [N, 2] float32, centred.

    Raises:
        DavaeError: more than 2000 points, for which the exact method takes too long.
    """
    count = len(rows)
    if count > MAXIMUM_POINTS:
        raise DavaeError(
            f"exact t-SNE takes at most {MAXIMUM_POINTS} points, got {count}: use a subset, or pca"
        )
    rows = rows.double()
    p = _affinities(torch.cdist(rows, rows).square(), max(min(perplexity, (count - 1) / 3), 1.1))
    start = torch.zeros(count, 2, dtype=rows.dtype)
    start[:, : min(2, rows.shape[1])] = rows[:, :2]
    y = 1e-4 * start / start[:, 0].std().clamp_min(1e-12)
    y = y + 1e-6 * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    rate = max(count / 12, 50.0)
    velocity, gains = torch.zeros_like(y), torch.ones_like(y)
    for step in range(steps):
        early = step < _EXAGGERATION_STEPS
        kernel = (1 + torch.cdist(y, y).square()).reciprocal().fill_diagonal_(0)
        q = (kernel / kernel.sum()).clamp_min(1e-12)
        pull = ((12.0 if early else 1.0) * p - q) * kernel  # [N, N]
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient.sign() == velocity.sign(), gains * 0.8, gains + 0.2).clamp_min(0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * gradient
        y = y + velocity
        y = y - y.mean(0)
    return y.float()
