"""Details in closed form: the linear details that tell most of the full-resolution latent beside the base latent.

Four latents stand on one grid, at every position of every image:

* ``prefix`` ``p``: what the decoder is given beside the details, the base latent of the reduced image;
* ``target`` ``t``: what grouped details are aligned with (Eq. 3), the same latent without the base's bound;
* ``source`` ``w``: what the encoder's last features give linearly, the latent of the full-size image, unshuffled;
* ``full`` ``y``: what the decoder's first layer needs, that latent with the base's bound.

Two maps are fitted from their second moments alone. With ``A`` the regression of ``t`` on ``w``, ``a = A w`` and ``r``
the residual of ``w`` on ``a``, with which ``t`` is uncorrelated too (``E[r t^T] = 0``):

    z_d[k] = a_k + H u_k          group k: its mean is a_k, what H spans is centred
    u      = U^T E[y | r]         principal components of what r tells of y (reduced-rank regression)
    y      ~ V [p, z_d] + c       ridge regression

With ``w = y`` and as many details as ``y`` has channels, ``z_d`` determines ``y``, and the estimate is exact.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.latents.alignment import grouped_mean

_RIDGE = 1e-6
"""Strength of the ridge regressions, relative to the mean square of the regressors."""


class LatentMoments:
    """Sums of outer products of ``[1, p, t, w, y]`` over positions, float64 on the CPU; of a hundred images or more.

    Args:
        channels: numbers of channels by name: ``prefix``, ``target``, ``source``, ``full``.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.places: dict[str, slice] = {"one": slice(0, 1)}
        size = 1
        for name, count in channels.items():
            self.places[name] = slice(size, size + count)
            size += count
        self.sums = torch.zeros(size, size, dtype=torch.float64)

    def update(self, latents: Mapping[str, Tensor]) -> None:
        """Add latents ``[B, n, h, w]`` on one grid, by name.

        Raises:
            DavaeError: a value that is not finite.
        """
        rows = [latents[name].detach().cpu().double().movedim(1, -1).flatten(0, -2) for name in [*self.places][1:]]
        values = torch.cat([torch.ones_like(rows[0][:, :1]), *rows], dim=1)  # [N, size]
        if not values.isfinite().all():
            raise DavaeError("a latent of these images holds a value that is not finite: check the images and the base")
        self.sums += values.T @ values

    def second_moment(self, a: str, b: str) -> Tensor:
        """``E[a b^T]``, ``[n_a, n_b]``."""
        return self.matrix()[self.places[a], self.places[b]]

    def matrix(self) -> Tensor:
        """``E[v v^T]`` of ``v = [1, p, t, w, y]``.

        Raises:
            DavaeError: nothing was added.
        """
        if not self.sums[0, 0]:
            raise DavaeError("the start is fitted to images and none was given: give a few dozen at least")
        return self.sums / self.sums[0, 0]

    def picks(self, name: str) -> Tensor:
        """The matrix that takes one latent out of ``v``."""
        return torch.eye(len(self.sums), dtype=torch.float64)[self.places[name]]


def fit_details(moments: LatentMoments, detail_channels: int) -> Tensor:
    """``z_d`` as a linear function of ``w``, ``[D, n_w]``: group means aligned with ``t``, residuals inside groups.

    There is no constant: where ``w`` is zero, as in the padding of a convolution, ``z_d`` is.

    Args:
        moments: of training images.
        detail_channels: ``D``, any number; those that exceed what ``w`` tells repeat their group's mean.
    """
    groups, inside = _directions(detail_channels, len(moments.second_moment("target", "one")))
    source = moments.second_moment("source", "source")
    aligned = _regression(moments.second_moment("target", "source"), source)  # A, [n_t, n_w]
    back = _regression(source @ aligned.T, aligned @ source @ aligned.T)  # of w on a
    residual = torch.eye(len(source), dtype=torch.float64) - back @ aligned  # r = residual w
    told = _regression(moments.second_moment("full", "source") @ residual.T, residual @ source @ residual.T)
    told = told @ residual  # E[y | r] = told w
    _, components = torch.linalg.eigh(told @ source @ told.T)
    components = _with_positive_peaks(components.flip(1)[:, : inside.shape[1]])
    directions = components.T @ told  # u, [m, n_w]
    return groups @ aligned + inside[:, : len(directions)] @ directions


def fit_estimate(moments: LatentMoments, details: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """``[p, z_d]`` to ``y``, ``V`` ``[n_y, n_p + D]`` and ``c`` ``[n_y]``: least squares, details zeroed now and then.

    Args:
        moments: of training images.
        details: of :func:`fit_details`, ``[D, n_w]``.
        dropout: share of the samples whose details are zero. With 0 the estimate relies on them alone for all that
            they tell better than ``p``.
    """
    known = torch.cat([moments.picks("one"), moments.picks("prefix")])
    given = torch.cat([known, details @ moments.picks("source")])  # [1, p, z_d] of v
    kept = torch.full((len(given),), 1 - dropout, dtype=torch.float64)
    kept[: len(known)] = 1.0
    gram = given @ moments.matrix() @ given.T * torch.minimum(kept[:, None], kept)
    cross = moments.picks("full") @ moments.matrix() @ given.T * kept
    found = _regression(cross, gram, penalised=slice(1, None))
    return found[:, 1:], found[:, 0]


def _regression(cross: Tensor, gram: Tensor, penalised: slice = slice(None)) -> Tensor:
    """``cross (gram + ridge)^-1``: the ridge regression of one variable on another, ``[n_y, n_x]``."""
    ridge = torch.zeros(len(gram), dtype=gram.dtype)
    ridge[penalised] = (_RIDGE * gram.diagonal()[penalised].mean()).clamp_min(1e-12)  # latents may be zero
    return torch.linalg.solve(gram + ridge.diag(), cross.T).T


def _directions(details: int, groups: int) -> tuple[Tensor, Tensor]:
    """Where the groups of Eq. 3 have their means and what is centred inside them.

    Returns:
        ``[D, groups]`` with 1 where a channel belongs to a group, and ``[D, m]``, orthonormal columns with a mean of
        zero in every group (Helmert's), the first of each group before the second of any.
    """
    means = grouped_mean(torch.eye(details, dtype=torch.float64)[:, :, None, None], groups)[:, :, 0, 0]
    member = (means > 0).double()  # [D, groups]
    columns = []
    for number in range(1, int(member.sum(dim=0).max())):
        for group in member.T:
            channels = group.nonzero()[:, 0]
            if len(channels) > number:
                column = torch.zeros(details, dtype=torch.float64)
                column[channels[:number]], column[channels[number]] = 1.0, -float(number)
                columns.append(column / column.norm())
    return member, torch.stack(columns, dim=1) if columns else member[:, :0]


def _with_positive_peaks(columns: Tensor) -> Tensor:
    """The columns, negated where their largest entry is negative: eigenvectors have no sign of their own."""
    peaks = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    return columns * peaks.sign()
