"""Principal axes and two-dimensional maps of a latent space."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from davae.errors import DavaeError

Method = Literal["pca", "tsne"]


def latent_rows(latents: Tensor, minimum: int) -> Tensor:
    """``[N, ...]`` as float64 rows ``[N, F]`` on the CPU.

    Raises:
        DavaeError: fewer than ``minimum``, or values that are not finite.
    """
    if latents.ndim < 2 or len(latents) < minimum:
        raise DavaeError(f"at least {minimum} latents [N, C, h, w] or [N, F] are needed, got {list(latents.shape)}")
    rows = latents.detach().flatten(1).double().cpu()
    if not rows.isfinite().all():
        raise DavaeError("the latents hold NaN or infinite values")
    return rows


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal component analysis by singular value decomposition.

    Attributes:
        mean: [F].
        axes: [K, F], orthonormal, by decreasing variance; the largest entry of each is positive.
        explained: [K], share of the total variance along each axis.
    """

    mean: Tensor
    axes: Tensor
    explained: Tensor

    @classmethod
    def fit(cls, latents: Tensor, components: int = 2) -> PrincipalAxes:
        """Find the axes of latents [N, ...] (flattened to [N, F])."""
        rows = latent_rows(latents, 2)
        if not 1 <= components <= min(rows.shape):
            raise DavaeError(f"{components} components asked of {rows.shape[0]} latents of {rows.shape[1]}")
        mean = rows.mean(0)
        _, singular, axes = torch.linalg.svd(rows - mean, full_matrices=False)
        axes = axes[:components]
        # The sign of a singular vector is arbitrary; fixing it keeps reports comparable.
        largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
        axes = axes * largest.sign()
        variance = singular.square()
        return cls(mean, axes, variance[:components] / variance.sum().clamp_min(1e-300))

    def transform(self, latents: Tensor) -> Tensor:
        """Coordinates [N, K] of latents [N, ...] along the axes."""
        return (latent_rows(latents, 1) - self.mean) @ self.axes.T


def project_latents(latents: Tensor, method: Method = "pca", *, seed: int = 0, perplexity: float = 30.0) -> Tensor:
    """Map latents to two dimensions.

    Args:
        latents: [N, C, h, w] or [N, F].
        method: ``"pca"`` (linear, fast) or ``"tsne"`` (van der Maaten and Hinton 2008; up to 2000 points).
        seed: for t-SNE.
        perplexity: for t-SNE, the effective number of neighbours; lowered if there are few points.

    Returns:
        [N, 2] float32.

    Raises:
        DavaeError: too few points, values that are not finite, or an unknown method.
    """
    if method == "pca":
        return PrincipalAxes.fit(latents).transform(latents).float()
    if method == "tsne":
        rows = latent_rows(latents, 5)
        components = min(50, *rows.shape)  # the authors' own preparation; also removes noise
        return tsne(PrincipalAxes.fit(rows, components).transform(rows), perplexity=perplexity, seed=seed)
    raise DavaeError(f"method must be 'pca' or 'tsne', got {method!r}")


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
    """Map rows to two dimensions so that neighbours stay neighbours.

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
        raise DavaeError(f"exact t-SNE takes at most {MAXIMUM_POINTS} points, got {count}: use a subset, or pca")
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
