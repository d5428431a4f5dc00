"""What a latent space looks like: two-dimensional maps and how well classes can be told apart in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.tsne import tsne


def _rows(latents: Tensor, minimum: int) -> Tensor:
    """[N, ...] -> float64 rows [N, F]."""
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
        rows = _rows(latents, 2)
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
        return (_rows(latents, 1) - self.mean) @ self.axes.T


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
        rows = _rows(latents, 5)
        components = min(50, *rows.shape)  # the authors' own preparation; also removes noise
        return tsne(PrincipalAxes.fit(rows, components).transform(rows), perplexity=perplexity, seed=seed)
    raise DavaeError(f"method must be 'pca' or 'tsne', got {method!r}")


def _labelled(latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    rows = _rows(latents, 2)
    labels = labels.detach().cpu().long()
    if labels.shape != (len(rows),):
        raise DavaeError(f"one label a latent is needed: {len(rows)} latents, labels {list(labels.shape)}")
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise DavaeError("class separability needs at least two classes")
    return rows, labels, len(classes)


def linear_probe_accuracy(
    latents: Tensor,
    labels: Tensor,
    *,
    train_fraction: float = 0.5,
    regularisation: float = 0.1,
    seed: int = 0,
) -> float:
    """Share of held-out latents that a ridge classifier puts in the right class.

    Closed form: ``W = (X'X + r n I)^-1 X'Y`` on standardised features and centred one-hot targets. The
    split is random but keeps the share of each class.

    Args:
        latents: [N, ...].
        labels: [N], whole numbers.
        train_fraction: share of each class used to fit; the rest is scored.
        regularisation: r, relative to the mean square of a feature, which is one.
        seed: of the split.

    Returns:
        Accuracy in [0, 1]; chance is the share of the most frequent class.

    Raises:
        DavaeError: fewer than two classes, or a class with a single latent.
    """
    rows, labels, classes = _labelled(latents, labels)
    generator = torch.Generator().manual_seed(seed)
    train = torch.zeros(len(rows), dtype=torch.bool)
    for index in range(classes):
        members = (labels == index).nonzero().flatten()
        if len(members) < 2:
            raise DavaeError("every class needs at least two latents, one to fit and one to score")
        order = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(train_fraction * len(members)), 1), len(members) - 1)
        train[order[:count]] = True

    mean, std = rows[train].mean(0), rows[train].std(0, correction=0)
    features = (rows - mean) / std.clamp_min(1e-8)
    targets = torch.nn.functional.one_hot(labels, classes).double()
    prior = targets[train].mean(0)
    x, y = features[train], targets[train] - prior
    strength = regularisation * len(x)
    if x.shape[1] <= len(x):
        weight = torch.linalg.solve(x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    else:  # the same solution through the smaller Gram matrix
        weight = x.T @ torch.linalg.solve(x @ x.T + strength * torch.eye(len(x), dtype=x.dtype), y)
    predicted = (features[~train] @ weight + prior).argmax(1)
    return float((predicted == labels[~train]).double().mean())


def nearest_neighbour_accuracy(latents: Tensor, labels: Tensor, *, neighbours: int = 5) -> float:
    """Share of latents whose nearest neighbours (itself left out) vote for its class.

    Features are standardised; ties go to the class of the nearer neighbour.

    Args:
        latents: [N, ...].
        labels: [N], whole numbers.
        neighbours: votes a latent.

    Returns:
        Accuracy in [0, 1].
    """
    rows, labels, classes = _labelled(latents, labels)
    if not 1 <= neighbours < len(rows):
        raise DavaeError(f"{neighbours} neighbours asked of {len(rows)} latents")
    features = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-8)
    distance = torch.cdist(features, features).fill_diagonal_(float("inf"))
    nearest = labels[distance.topk(neighbours, largest=False).indices]  # [N, k], nearest first
    # A vote is worth a hair less the farther it comes from, which only matters in a tie.
    worth = 1 - 1e-3 * torch.arange(neighbours, dtype=torch.float64) / neighbours
    votes = torch.nn.functional.one_hot(nearest, classes).double() * worth[None, :, None]
    return float((votes.sum(1).argmax(1) == labels).double().mean())
