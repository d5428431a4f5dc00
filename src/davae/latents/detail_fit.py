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
    y      ~ V [p, z_d] + c       ridge regression, cell by cell, then on the 3x3 cells around what that leaves

With ``w = y`` and as many details as ``y`` has channels, ``z_d`` determines ``y`` in each cell, and the estimate is
exact.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.errors import DavaeError
from davae.latents.alignment import grouped_mean

_RIDGE = 1e-6
"""Strength of the ridge regressions, relative to the mean square of the regressors."""

_AROUND, _OWN = 9, 4
"""How many cells a 3x3 convolution sees, and which is the position's own; zero outside the image, as padding is."""


class LatentMoments:
    """Second moments of ``p``, ``t``, ``w`` and ``y`` over positions, in float64; of a hundred images or more.

    Those of ``[1, p, w]`` with ``[1, p, w, y, t]`` are summed, where ``p``, ``w`` and ``y`` stand for their values in
    the 3x3 cells around a position, channel by channel.

    Args:
        channels: numbers of channels by name: ``prefix``, ``target``, ``source``, ``full``.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.channels = dict(channels)
        self._places: dict[str, slice] = {"one": slice(0, 1)}
        size = 1
        for name in ("prefix", "source", "full", "target"):
            count = channels[name] * (1 if name == "target" else _AROUND)
            self._places[name] = slice(size, size + count)
            size += count
        self.sums = torch.zeros(self._places["source"].stop, size, dtype=torch.float64)

    def update(self, latents: Mapping[str, Tensor]) -> None:
        """Add latents ``[B, n, h, w]`` on one grid, by name.

        Raises:
            DavaeError: a value that is not finite.
        """
        given = {name: latents[name].detach().cpu().double() for name in self.channels}
        if not all(latent.isfinite().all() for latent in given.values()):
            raise DavaeError("a latent of these images holds a value that is not finite: check the images and the base")
        around = [F.unfold(given[name], 3, padding=1).movedim(1, -1) for name in ("prefix", "source", "full")]
        target = given["target"].flatten(2).movedim(1, -1)  # [B, N, n]
        values = torch.cat([torch.ones_like(target[..., :1]), *around, target], dim=-1).flatten(0, 1)
        self.sums += values[:, : len(self.sums)].T @ values

    @property
    def positions(self) -> int:
        """How many positions were added.

        Raises:
            DavaeError: none.
        """
        if not self.sums[0, 0]:
            raise DavaeError("the start is fitted to images and none was given: give a few dozen at least")
        return int(self.sums[0, 0])

    def around(self) -> Tensor:
        """``E[g g^T]``, ``[n_g, n_g]``, of ``g = [1, p, w]``, the latents in the cells around a position."""
        return self.sums[:, : len(self.sums)] / self.positions

    def around_with_full(self) -> Tensor:
        """``E[y g^T]``, ``[9 n_y, n_g]``."""
        return self.sums[:, self._places["full"]].T / self.positions

    def with_source(self, name: str) -> Tensor:
        """``E[v w^T]`` at the position itself, ``v`` the latent of a name: ``[n_v, n_w]``."""
        rows, columns = self._places["source"], self._places[name]
        found = self.sums[rows, columns][_OWN::_AROUND]
        return (found if name == "target" else found[:, _OWN::_AROUND]).T / self.positions


def fit_details(moments: LatentMoments, detail_channels: int) -> Tensor:
    """``z_d`` as a linear function of ``w``, ``[D, n_w]``: group means aligned with ``t``, residuals inside groups.

    There is no constant: where ``w`` is zero, as in the padding of a convolution, ``z_d`` is.

    Args:
        moments: of training images.
        detail_channels: ``D``, any number; those that exceed what ``w`` tells repeat their group's mean.
    """
    groups, inside = _directions(detail_channels, moments.channels["target"])
    source = moments.with_source("source")
    aligned = _regression(moments.with_source("target"), source)  # A, [n_t, n_w]
    back = _regression(source @ aligned.T, aligned @ source @ aligned.T)  # of w on a
    residual = torch.eye(len(source), dtype=torch.float64) - back @ aligned  # r = residual w
    told = _regression(moments.with_source("full") @ residual.T, residual @ source @ residual.T)
    told = told @ residual  # E[y | r] = told w
    _, components = torch.linalg.eigh(told @ source @ told.T)
    components = _with_positive_peaks(components.flip(1)[:, : inside.shape[1]])
    directions = components.T @ told  # u, [m, n_w]
    return groups @ aligned + inside[:, : len(directions)] @ directions


def fit_estimate(moments: LatentMoments, details: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """``y`` in the 3x3 cells around a position from ``[p, z_d]`` in them: least squares, details zeroed now and then.

    What a cell tells of itself is fitted first. What the cells around it tell beside that follows with a ridge of
    regressors per position, so that few images add little to it.

    Args:
        moments: of training images.
        details: of :func:`fit_details`, ``[D, n_w]``.
        dropout: share of the samples whose details are zero. With 0 the estimate relies on them alone for all that
            they tell better than ``p``.

    Returns:
        ``V``, ``[9 n_y, 9 (n_p + D)]``, and ``c``, ``[9 n_y]``; the nine cells of a channel follow each other.
    """
    known = torch.eye(1 + _AROUND * moments.channels["prefix"], dtype=torch.float64)
    given = torch.block_diag(known, _in_each_cell(details))  # [1, p, z_d] of g
    kept = torch.full((len(given),), 1 - dropout, dtype=torch.float64)
    kept[: len(known)] = 1.0
    gram = given @ moments.around() @ given.T * torch.minimum(kept[:, None], kept)
    cross = moments.around_with_full() @ given.T * kept

    own = torch.cat([torch.zeros(1, dtype=torch.long), torch.arange(1 + _OWN, len(gram), _AROUND)])
    in_cell = _regression(cross[_OWN::_AROUND, own], gram[own][:, own], penalised=slice(1, None))
    first = torch.cat([in_cell[:, :1].repeat_interleave(_AROUND, dim=0), _in_each_cell(in_cell[:, 1:])], dim=1)
    ridge = max(_RIDGE, len(gram) / moments.positions)
    found = first + _regression(cross - first @ gram, gram, penalised=slice(1, None), ridge=ridge)
    return found[:, 1:], found[:, 0]


def _in_each_cell(weight: Tensor) -> Tensor:
    """A map of one cell, ``[o, i]``, applied to each of the nine: ``[9 o, 9 i]``."""
    return torch.kron(weight, torch.eye(_AROUND, dtype=weight.dtype))


def _regression(cross: Tensor, gram: Tensor, penalised: slice = slice(None), ridge: float = _RIDGE) -> Tensor:
    """``cross (gram + ridge)^-1``: the ridge regression of one variable on another, ``[n_y, n_x]``."""
    added = torch.zeros(len(gram), dtype=gram.dtype)
    added[penalised] = (ridge * gram.diagonal()[penalised].mean()).clamp_min(1e-12)  # latents may be zero
    return torch.linalg.solve(gram + added.diag(), cross.T).T


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
