"""The two linear maps of the fitted start, on latents whose best estimates are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import grouped_mean
from davae.latents.detail_fit import LatentMoments, fit_details, fit_estimate

C, CELLS = 3, 4


def latents(noise: float = 0.3) -> dict[str, Tensor]:
    """A full-size latent whose channels vary unequally, and a base latent that is near to its mean over cells."""
    spread = torch.tensor([[2.0, 0.5, 0.3, 0.1], [1.5, 1.0, 0.2, 0.1], [1.0, 0.9, 0.8, 0.1]])
    common = torch.randn(8, C, 1, 8, 8)
    full = common + spread[None, :, :, None, None] * torch.randn(8, C, CELLS, 8, 8)
    base = full.mean(dim=2) + noise * torch.randn(8, C, 8, 8)
    return {"prefix": base, "target": base, "source": full.flatten(1, 2), "full": full.flatten(1, 2)}


def fit(given: dict[str, Tensor], details: int, dropout: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    moments = LatentMoments({name: latent.shape[1] for name, latent in given.items()})
    for name_and_parts in zip(*(latent.split(3) for latent in given.values()), strict=True):
        moments.update(dict(zip(given, name_and_parts, strict=True)))
    down = fit_details(moments, details)
    return down, *fit_estimate(moments, down, dropout)


def apply(weight: Tensor, latent: Tensor) -> Tensor:
    return torch.einsum("oi,bihw->bohw", weight, latent.double())


def estimate_error(given: dict[str, Tensor], details: int, dropout: float = 0.0, kept: float = 1.0) -> float:
    """Mean squared error of the full latent, relative."""
    down, weight, offset = fit(given, details, dropout)
    z_d = kept * apply(down, given["source"])
    made = apply(weight, torch.cat([given["prefix"], z_d], dim=1)) + offset[:, None, None]
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
    assert estimate_error(given, 12) == pytest.approx(float(best), rel=0.01)


def test_the_fit_is_the_same_each_time_and_needs_values() -> None:
    given = latents()
    assert all(torch.equal(a, b) for a, b in zip(fit(given, 9), fit(given, 9), strict=True))
    moments = LatentMoments({name: latent.shape[1] for name, latent in given.items()})
    with pytest.raises(DavaeError, match="none was given"):
        fit_details(moments, 9)
    with pytest.raises(DavaeError, match="not finite"):
        moments.update({**given, "full": given["full"] / 0})
