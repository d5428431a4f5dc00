"""The two linear maps of the fitted start, on latents whose best estimates are known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import grouped_mean
from davae.latents.detail_fit import LatentMoments, fit_details, fit_estimate

C, CELLS = 3, 4


def latents(noise: float = 0.3, count: int = 64) -> dict[str, Tensor]:
    """A full-size latent whose channels vary unequally, and a base latent that is near to its mean over cells.

    Cells are independent of each other.
    """
    spread = torch.tensor([[2.0, 0.5, 0.3, 0.1], [1.5, 1.0, 0.2, 0.1], [1.0, 0.9, 0.8, 0.1]])
    common = torch.randn(count, C, 1, 8, 8)
    full = common + spread[None, :, :, None, None] * torch.randn(count, C, CELLS, 8, 8)
    base = full.mean(dim=2) + noise * torch.randn(count, C, 8, 8)
    return {"prefix": base, "target": base, "source": full.flatten(1, 2), "full": full.flatten(1, 2)}


def fit(given: dict[str, Tensor], details: int, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    moments = LatentMoments({name: latent.shape[1] for name, latent in given.items()})
    for name_and_parts in zip(*(latent.split(24) for latent in given.values()), strict=True):
        moments.update(dict(zip(given, name_and_parts, strict=True)))
    down = fit_details(moments, details)
    return down, *fit_estimate(moments, down, dropout)


def estimate(weight: Tensor, offset: Tensor, prefix: Tensor, z_d: Tensor) -> Tensor:
    """The estimate of the position's own cell, by the convolution that it is the middle of."""
    given = torch.cat([prefix.double(), z_d.double()], dim=1)
    return F.conv2d(given, weight[4::9].unflatten(1, (-1, 3, 3)), offset[4::9], padding=1)


def apply(weight: Tensor, latent: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", weight, latent.double())


def estimate_error(given: dict[str, Tensor], details: int, dropout: float = 0.0, kept: float = 1.0) -> float:
    """Mean squared error of the full latent, relative."""
    down, weight, offset = fit(given, details, dropout)
    z_d = kept * apply(down, given["source"])
    made = estimate(weight, offset, given["prefix"], z_d)
    return float((made - given["full"]).square().mean() / given["full"].square().mean())


@pytest.mark.parametrize("details", [1, 2, 3, 5, 6, 9, 12, 20])
def test_group_means_are_the_best_linear_estimate_of_the_base_latent(details: int) -> None:
    given = latents()
    down, *_ = fit(given, details)
    assert down.shape == (details, C * CELLS)
    made = grouped_mean(apply(down, given["source"]), C)
    w, t = (given[name].double().movedim(1, -1).flatten(0, -2) for name in ("source", "target"))
    best = (w @ torch.linalg.lstsq(w, t).solution).T
    groups = made.movedim(1, 0).flatten(1)
    served = groups.square().sum(dim=1) > 0  # with few channels some groups are empty
    assert int(served.sum()) == min(details, C)
    assert torch.allclose(groups[served], best[served], atol=1e-4)


def test_each_further_channel_lowers_the_error_and_all_of_them_leave_none() -> None:
    given = latents()
    errors = [estimate_error(given, details) for details in (3, 6, 9, 12)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-9
    assert errors[-2] > 1e-3


def test_residuals_are_the_principal_components_of_what_group_means_leave() -> None:
    """The error of ``D`` channels is the sum of the least eigenvalues of the residual's second moment."""
    given = latents(noise=0.0)  # the decoder knows the group means without the details
    w, t = (given[name].double().movedim(1, -1).flatten(0, -2) for name in ("source", "target"))
    residual = w - t @ torch.linalg.lstsq(t, w).solution
    values = torch.linalg.eigvalsh(residual.T @ residual).flip(0)
    for details, found in ((6, 3), (9, 6)):
        left = float(values[found:].sum() / w.square().sum())
        assert estimate_error(given, details) == pytest.approx(left, rel=0.02)  # a constant helps by chance


def test_what_the_cells_around_tell_is_used() -> None:
    """Details that are too few for the full latent, which follows its neighbour to the left: a cell cannot know it."""
    given = latents()
    moved = F.pad(given["prefix"], (1, 0, 0, 0))[..., :-1]
    given["full"] = given["full"] + 3 * moved.repeat_interleave(CELLS, dim=1)
    down, weight, offset = fit(given, C)
    z_d = apply(down, given["source"])
    around = estimate(weight, offset, given["prefix"], z_d)
    own = weight[4::9].unflatten(1, (-1, 9))[..., 4]
    alone = apply(own, torch.cat([given["prefix"], z_d], dim=1)) + offset[4::9, None, None]
    left, left_alone = ((made - given["full"]).square().mean() for made in (around, alone))
    assert left_alone - left > 0.8 * (3 * moved).square().mean()


def test_few_images_are_not_learnt_by_heart() -> None:
    """With fewer positions than regressors unseen latents are estimated about as well as from the cell alone."""
    few, unseen = latents(count=2), latents(count=16)
    down, weight, offset = fit(few, 6)
    z_d, unseen_z_d = (apply(down, given["source"]) for given in (few, unseen))
    made = estimate(weight, offset, unseen["prefix"], unseen_z_d)

    def rows(*parts: Tensor) -> Tensor:
        return torch.cat([part.double() for part in parts], dim=1).movedim(1, -1).flatten(0, -2)

    in_cell = torch.linalg.lstsq(rows(few["prefix"], z_d), rows(few["full"])).solution
    alone = rows(unseen["prefix"], unseen_z_d) @ in_cell - rows(unseen["full"])
    assert float((made - unseen["full"]).square().mean()) < 1.3 * float(alone.square().mean())


def test_where_details_are_dropped_the_base_latent_is_relied_on() -> None:
    given = latents()
    alone, dropped = ([estimate_error(given, 12, q, kept) for kept in (1.0, 0.0)] for q in (0.0, 0.1))
    assert alone[0] < 1e-9
    assert alone[1] > 0.9  # nothing without details
    known = {**given, "source": torch.zeros_like(given["source"])}  # what the base latent tells at best
    best = estimate_error(known, 12)
    assert best < dropped[1] < (best + alone[1]) / 2
    assert 0.9 * dropped[0] + 0.1 * dropped[1] < 0.9 * alone[0] + 0.1 * alone[1]
    for shift in (0.05, 0.2):  # the least expected error is at the share that is dropped
        other = [estimate_error(given, 12, shift, kept) for kept in (1.0, 0.0)]
        assert 0.9 * dropped[0] + 0.1 * dropped[1] < 0.9 * other[0] + 0.1 * other[1]


def test_a_bound_of_the_decoder_is_estimated_as_well_as_a_linear_map_can() -> None:
    given = latents()
    given["full"] = torch.tanh(given["full"])
    w, y = (given[name].double().movedim(1, -1).flatten(0, -2) for name in ("source", "full"))
    best = (y - w @ torch.linalg.lstsq(w, y).solution).square().mean() / y.square().mean()
    assert estimate_error(given, 12) == pytest.approx(float(best), rel=0.04)


def test_the_fit_is_the_same_each_time_and_needs_values() -> None:
    given = latents()
    assert all(torch.equal(a, b) for a, b in zip(fit(given, 9), fit(given, 9), strict=True))
    moments = LatentMoments({name: latent.shape[1] for name, latent in given.items()})
    with pytest.raises(DavaeError, match="none was given"):
        fit_details(moments, 9)
    with pytest.raises(DavaeError, match="not finite"):
        moments.update({**given, "full": given["full"] / 0})
