"""What a latent space looks like: principal axes and two-dimensional maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.tsne import tsne


def latent_rows(latents: Tensor, minimum: int) -> Tensor:
    """``[N, ...]`` as float64 rows ``[N, F]`` on the CPU.

    Raises:
        DavaeError: fewer than ``minimum``, or values that are not finite.
    """
    if latents.ndim < 2 or len(latents) < minimum:
        raise DavaeError(
            f"at least {minimum} latents [N, C, h, w] or [N, F] are needed, got {list(latents.shape)}"
        )
    rows = latents.detach().flatten(1).double().cpu()
    if not rows.isfinite().all():
        raise DavaeError("the latents hold NaN or infinite values")
    return rows


@dataclass(frozen=True)
class PrincipalAxes:
    """Principal component analysis by singular value decomposition.

    Attributes:
        mean: [F].
        axes: [K, F], orthonormal, by falling variance; the largest entry of each is positive.
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


def project_latents(
    latents: Tensor, method: Literal["pca", "tsne"] = "pca", *, seed: int = 0, perplexity: float = 30.0
) -> Tensor:
    """Lay latents out in the plane.

    Args:
        latents: [N, C, h, w] or [N, F].
        method: ``"pca"`` (linear, fast) or ``"tsne"`` (van der Maaten and Hinton 2008; up to 2000 points).
        seed: for t-SNE.
        perplexity: for t-SNE, the effective number of neighbours; lowered where there are few points.

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
