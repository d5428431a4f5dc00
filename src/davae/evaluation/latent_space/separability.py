"""Separability of classes in a latent space: linear probes and nearest neighbours."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from davae.errors import DavaeError
from davae.evaluation.latent_space.projection import latent_rows

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)


class Probe(NamedTuple):
    """Held-out accuracy in [0, 1]: mean and standard deviation over splits."""

    mean: float
    std: float


def linear_probe(
    latents: Tensor, labels: Tensor, *, splits: int = 5, strengths: Sequence[float] = STRENGTHS, seed: int = 0
) -> Probe:
    """Held-out accuracy of a ridge classifier.

    Base and detail latents have different numbers of channels, and need different regularisation. So each stratified
    split (half to fit, half to score) chooses its own: the strength that scores best when the first half is split
    again.

    Args:
        latents: [N, ...].
        labels: [N], whole numbers; at least two latents per class.
        splits: number of random splits.
        strengths: of the regularisation, relative to the mean square of a feature, which is one.
        seed: of the splits.

    Raises:
        DavaeError: fewer than two classes, or a class with a single latent.
    """
    rows, labels, classes = labelled_rows(latents, labels)
    accuracies = []
    for split in range(splits):
        train = stratified_split(labels, classes, 0.5, seed + split)
        strength = _chosen(rows[train], labels[train], classes, strengths, seed + split)
        (accuracy,) = ridge_accuracies(rows, labels, classes, train, [strength])
        accuracies.append(accuracy)
    found = torch.tensor(accuracies, dtype=torch.float64)
    return Probe(float(found.mean()), float(found.std(correction=0)))


def _chosen(rows: Tensor, labels: Tensor, classes: int, strengths: Sequence[float], seed: int) -> float:
    if int(labels.bincount(minlength=classes).min()) < 2:
        return strengths[len(strengths) // 2]  # a class of one latent cannot be split once more
    inner = stratified_split(labels, classes, 0.5, seed)
    scores = ridge_accuracies(rows, labels, classes, inner, strengths)
    return strengths[scores.index(max(scores))]


def ridge_accuracies(
    rows: Tensor, labels: Tensor, classes: int, train: Tensor, strengths: Sequence[float]
) -> list[float]:
    """Share of the rows outside ``train`` that are classified correctly, for each strength.

    ``W = (X'X + r n I)^-1 X'Y`` on standardised features and centred one-hot targets, through the eigenvectors of the
    smaller Gram matrix, which serve every strength.

    Args:
        rows: ``[N, F]`` float64.
        labels: ``[N]``, 0 to ``classes`` - 1.
        classes: how many.
        train: ``[N]``, true where a row is fitted.
        strengths: r.
    """
    mean, std = rows[train].mean(0), rows[train].std(0, correction=0)
    features = (rows - mean) / std.clamp_min(1e-8)
    targets = F.one_hot(labels, classes).double()
    prior = targets[train].mean(0)
    x, y, unseen = features[train], targets[train] - prior, features[~train]
    wide = x.shape[1] > len(x)
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    # Scores of unseen rows are left diag(1 / (values + r n)) right, with the middle alone depending on r.
    left = (unseen @ x.T if wide else unseen) @ vectors
    right = vectors.T @ (y if wide else x.T @ y)
    found = []
    for strength in strengths:
        scores = left @ (right / (values.clamp_min(0) + strength * len(x))[:, None]) + prior
        found.append(float((scores.argmax(1) == labels[~train]).double().mean()))
    return found


def labelled_rows(latents: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Latents ``[N, ...]`` as float64 rows ``[N, F]``, labels renumbered from 0, and the number of classes.

    Raises:
        DavaeError: not one label per latent, or fewer than two classes.
    """
    rows = latent_rows(latents, 2)
    labels = labels.detach().cpu().long()
    if labels.shape != (len(rows),):
        raise DavaeError(f"one label a latent is needed: {len(rows)} latents, labels {list(labels.shape)}")
    classes, labels = labels.unique(return_inverse=True)
    if len(classes) < 2:
        raise DavaeError("class separability needs at least two classes")
    return rows, labels, len(classes)


def stratified_split(labels: Tensor, classes: int, fraction: float, seed: int) -> Tensor:
    """``[N]``, true for the latents to fit: a random ``fraction`` of each class, at least one, but not all.

    Raises:
        DavaeError: a class with a single latent.
    """
    generator = torch.Generator().manual_seed(seed)
    train = torch.zeros(len(labels), dtype=torch.bool)
    for index in range(classes):
        members = (labels == index).nonzero().flatten()
        if len(members) < 2:
            raise DavaeError("every class needs at least two latents, one to fit and one to score")
        order = members[torch.randperm(len(members), generator=generator)]
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        train[order[:count]] = True
    return train


def linear_probe_accuracy(
    latents: Tensor, labels: Tensor, *, train_fraction: float = 0.5, regularisation: float = 0.1, seed: int = 0
) -> float:
    """Share of held-out latents that a ridge classifier classifies correctly.

    The split is random but keeps the share of each class; see :func:`ridge_accuracies`.

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
    rows, labels, classes = labelled_rows(latents, labels)
    train = stratified_split(labels, classes, train_fraction, seed)
    return ridge_accuracies(rows, labels, classes, train, [regularisation])[0]


def nearest_neighbour_accuracy(latents: Tensor, labels: Tensor, *, neighbours: int = 5) -> float:
    """Share of latents whose nearest neighbours (itself left out) vote for its class.

    Features are standardised; ties go to the class of the nearer neighbour.

    Args:
        latents: [N, ...].
        labels: [N], whole numbers.
        neighbours: votes per latent.

    Returns:
        Accuracy in [0, 1].
    """
    rows, labels, classes = labelled_rows(latents, labels)
    if not 1 <= neighbours < len(rows):
        raise DavaeError(f"{neighbours} neighbours asked of {len(rows)} latents")
    features = (rows - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-8)
    distance = torch.cdist(features, features).fill_diagonal_(float("inf"))
    nearest = labels[distance.topk(neighbours, largest=False).indices]  # [N, k], nearest first
    # Votes of farther neighbours count slightly less, which only matters for ties.
    worth = 1 - 1e-3 * torch.arange(neighbours, dtype=torch.float64) / neighbours
    votes = F.one_hot(nearest, classes).double() * worth[None, :, None]
    return float((votes.sum(1).argmax(1) == labels).double().mean())
