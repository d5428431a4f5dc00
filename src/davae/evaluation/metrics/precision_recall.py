"""Improved precision and recall (Kynkäänniemi et al. 2019): fidelity and diversity separately.

Each set is represented by balls around its features, with the distance to the k-th nearest neighbour as radius.
Precision is the share of generated images inside the real set's balls, recall the share of real images inside the
generated set's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from davae.errors import DavaeError


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]."""

    precision: float
    recall: float


def precision_recall(real: Tensor, generated: Tensor, *, neighbours: int = 3, chunk: int = 1024) -> PrecisionRecall:
    """Precision and recall of features.

    Args:
        real: ``[N, F]``.
        generated: ``[M, F]``.
        neighbours: k; 3 is the published choice.
        chunk: rows handled at once; bounds memory, does not change the result.

    Raises:
        DavaeError: a set has no k-th neighbour, or features of different networks.
    """
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise DavaeError(f"features must be rows of one length, got {list(real.shape)} and {list(generated.shape)}")
    if min(len(real), len(generated)) <= neighbours:
        raise DavaeError(f"{neighbours} neighbours need more images than {len(real)} and {len(generated)}")
    real, generated = real.double(), generated.double()
    return PrecisionRecall(
        _share_inside(generated, real, _radii(real, neighbours, chunk), chunk),
        _share_inside(real, generated, _radii(generated, neighbours, chunk), chunk),
    )


def _radii(rows: Tensor, neighbours: int, chunk: int) -> Tensor:
    """Distance of every row to its k-th nearest other row, ``[N]``."""
    # The nearest one is the row itself, hence k + 1. Exact up to 4096 rows: a matrix product loses small distances.
    return torch.cat([_distances(part, rows).kthvalue(neighbours + 1, dim=1).values for part in rows.split(chunk)])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, chunk: int) -> float:
    inside = [(_distances(part, centres) <= radii).any(dim=1) for part in points.split(chunk)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    exact = "donot_use_mm_for_euclid_dist" if len(b) <= 4096 else "use_mm_for_euclid_dist_if_necessary"
    return torch.cdist(a, b, compute_mode=exact)
