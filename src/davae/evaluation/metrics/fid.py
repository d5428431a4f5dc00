"""Fréchet distance between two sets of features, each modelled as a Gaussian (Heusel et al. 2017).

It depends on means and covariances only, so a set of images can be shared as a small file: an
``.npz`` with ``mu`` and ``sigma``, as published by guided diffusion (ADM) for ImageNet.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.runtime.atomic_files import atomic_file, file_hash
from davae.runtime.text_files import open_regular


@dataclass(frozen=True)
class Gaussian:
    """Moments of features.

    Attributes:
        mean: ``[F]`` float64.
        covariance: ``[F, F]`` float64, divided by N - 1.
        count: N; ``None`` if unknown (read from a file).
    """

    mean: Tensor
    covariance: Tensor
    count: int | None = None

    @cached_property
    def factor(self) -> Tensor:
        """``A`` ``[F, rank]`` with ``A A^T`` the covariance; eigenvalues as small as rounding errors are dropped."""
        values, vectors = torch.linalg.eigh(self.covariance.double())
        rounding = len(values) * torch.finfo(torch.float64).eps * values.abs().max()
        kept = values > rounding
        return vectors[:, kept] * values[kept].sqrt()

    def sha256(self) -> str:
        """Hash of mean and covariance as float64 bytes, the mean first."""
        found = hashlib.sha256(self.mean.double().numpy().tobytes())
        found.update(self.covariance.double().contiguous().numpy().tobytes())
        return found.hexdigest()


class GaussianStatistics:
    """Mean and covariance, in float64, of rows added in batches.

    Batches are merged by the update of Chan, Golub and LeVeque (1979), which subtracts means before squaring, so
    that large offsets lose no digits and the result does not depend on the split into batches.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._scatter: Tensor | None = None

    def update(self, rows: Tensor) -> GaussianStatistics:
        """Add rows ``[B, F]``; returns itself.

        Raises:
            DavaeError: another shape than before, or values that are not finite.
        """
        if rows.ndim != 2 or (self._mean is not None and rows.shape[1] != len(self._mean)):
            expected = "[B, F]" if self._mean is None else f"[B, {len(self._mean)}]"
            raise DavaeError(f"features must be rows {expected}, got {list(rows.shape)}")
        if not rows.isfinite().all():
            raise DavaeError("the features hold NaN or infinite values: look at the images and the feature network")
        if len(rows) == 0:
            return self
        rows = rows.detach().double().cpu()
        mean = rows.mean(0)
        centred = rows - mean
        scatter = centred.T @ centred
        if self._mean is None or self._scatter is None:
            self.count, self._mean, self._scatter = len(rows), mean, scatter
            return self
        total = self.count + len(rows)
        gap = mean - self._mean
        self._scatter += scatter + torch.outer(gap, gap) * (self.count * len(rows) / total)
        self._mean = self._mean + gap * (len(rows) / total)
        self.count = total
        return self

    def gaussian(self) -> Gaussian:
        """The moments so far.

        Raises:
            DavaeError: fewer than two rows were added.
        """
        if self._mean is None or self._scatter is None or self.count < 2:
            raise DavaeError(f"a covariance needs at least 2 images, got {self.count}")
        return Gaussian(self._mean.clone(), self._scatter / (self.count - 1), self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """``|mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 sum_i sqrt(l_i)``, with ``l_i`` the eigenvalues of ``S_a S_b``.

    The roots of these eigenvalues are the singular values of ``A^T B``, where ``S_a = A A^T`` and ``S_b = B B^T``. This
    way rounding errors are not amplified by a square root, singular covariances give no complex eigenvalues, and it is
    fast for fewer images than features.

    Raises:
        DavaeError: the numbers of features differ.
    """
    if a.mean.shape != b.mean.shape:
        raise DavaeError(
            f"features of different networks cannot be compared: {len(a.mean)} against {len(b.mean)} numbers an image"
        )
    roots = torch.linalg.svdvals(a.factor.T @ b.factor)
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * roots.sum()
    return float(distance)


def save_statistics(gaussian: Gaussian, file: str | Path) -> str:
    """Write ``mu`` and ``sigma`` (and ``count``) to an ``.npz`` as ADM does; returns the file's SHA-256."""
    path = Path(file)
    if path.suffix != ".npz":
        raise DavaeError(f"statistics are written to a .npz file, not to {path}")
    arrays: dict[str, Any] = {"mu": gaussian.mean.numpy(), "sigma": gaussian.covariance.numpy()}
    if gaussian.count is not None:
        arrays["count"] = np.int64(gaussian.count)
    with atomic_file(path) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)
    return file_hash(path)


def load_statistics(file: str | Path) -> Gaussian:
    """Read the moments of an ``.npz`` with ``mu`` ``[F]`` and ``sigma`` ``[F, F]``; other entries are ignored.

    Raises:
        DavaeError: no such file, no ``.npz``, or entries that are missing or misshapen.
    """
    path = Path(file)
    try:
        with open_regular(path) as opened, np.load(opened, allow_pickle=False) as found:
            missing = [name for name in ("mu", "sigma") if name not in found]
            if missing:
                raise DavaeError(
                    f"{path} has no '{missing[0]}' (it has {', '.join(found.files)}): statistics have mu and sigma"
                )
            mean, covariance = (torch.from_numpy(np.asarray(found[k], np.float64)) for k in ("mu", "sigma"))
            count = int(found["count"]) if "count" in found else None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DavaeError):
            raise
        raise DavaeError(f"cannot read statistics from {path}: {error}") from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"mu is {list(mean.shape)} and sigma {list(covariance.shape)}"
        raise DavaeError(f"{path}: {shapes}; [F] and [F, F] are needed")
    return Gaussian(mean, covariance, count)
