"""Outside their domain the public functions of ``davae.diffusion`` and ``davae.latents`` raise."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import davae.diffusion
import davae.latents
from davae.diffusion import (
    DdpmProcess,
    FlowLoss,
    VariationalBound,
    cosine_loss,
    detail_weight,
    guide,
    interpolate,
    is_guided,
    min_snr_weight,
    noise_from_velocity,
    sample_sigmas,
    sample_unit,
    sd3_sigma_table,
    set_sigmas,
    shift_sigmas,
    structured_loss,
    velocity_of,
    x0_from_velocity,
)
from davae.diffusion.schedulers import shifted_scheduler
from davae.errors import DavaeError
from davae.latents import (
    AlignmentLoss,
    ChannelStatistics,
    LatentLayout,
    gaussian_kl,
    gradient_ratio,
    grouped_mean,
    latent_affine,
    to_raw,
    to_scaled,
    token_count,
)

INF, NAN = float("inf"), float("nan")
X, LAYOUT = torch.ones(2, 4, 3, 3), LatentLayout(1, 3)
S = torch.tensor([0.2, 0.8])
FALLING = torch.linspace(0.99, 0.01, 10)
BOUND = VariationalBound(FALLING)
WRONG: list[Callable[[], Any]] = [
    *(lambda shift=shift: shift_sigmas(S, shift) for shift in (0.0, -1.0, INF, NAN)),
    *(lambda shift=shift: sample_sigmas(2, shift=shift) for shift in (0.0, NAN)),
    *(lambda options=options: sample_unit(2, **options) for options in ({"std": 0.0}, {"std": INF}, {"mean": NAN})),
    lambda: sample_unit(-1),
    *(lambda shifts=shifts: sd3_sigma_table(*shifts) for shifts in ((0.0, 4.0), (3.0, 0.0), (3.0, 4.0, 0), (NAN,))),
    lambda: set_sigmas(FlowMatchEulerDiscreteScheduler(), 0, torch.device("cpu")),
    lambda: shifted_scheduler(FlowMatchEulerDiscreteScheduler(), 0.0),
    *(lambda step=step: detail_weight(step, 10) for step in (-1, NAN, INF)),
    lambda: detail_weight(0, 10, NAN),
    *(lambda gamma=gamma: min_snr_weight(S, gamma) for gamma in (0.0, -1.0, INF, NAN)),
    *(lambda weight=weight: structured_loss(X, X, LAYOUT, weight) for weight in (-0.1, INF, NAN)),
    lambda: structured_loss(X, X[:1], LAYOUT, 1.0),
    lambda: cosine_loss(X, X[:, :2]),
    *(lambda gamma=gamma: FlowLoss(LAYOUT, min_snr_gamma=gamma) for gamma in (0.0, NAN)),
    *(lambda weight=weight: FlowLoss(LAYOUT, cosine_weight=weight) for weight in (-1.0, INF)),
    *(lambda gamma=gamma: DdpmProcess(LAYOUT, {}, min_snr_gamma=gamma) for gamma in (0.0, INF)),
    lambda: DdpmProcess(LAYOUT, {"rescale_betas_zero_snr": True}).bound,
    *(lambda a=a: VariationalBound(a) for a in (FALLING.flip(0), FALLING - 0.01, FALLING + 0.01, FALLING[:1])),
    *(lambda t=t: BOUND(X, X, data=X, noisy=X, timestep=torch.tensor([0, t])) for t in (-1, 10)),
    *(lambda count=count: guide(X, X, 2.0, count) for count in (-1, 5)),
    *(lambda scale=scale: guide(X, X, scale) for scale in (INF, NAN)),
    lambda: guide(X, X[:1], 2.0),
    *(lambda interval=interval: is_guided(0.5, interval) for interval in ((1.0, 0.0), (NAN, 1.0))),
    lambda: interpolate(X, X[:1], S),
    lambda: interpolate(X[:1], X[:1], S),
    lambda: velocity_of(X, X[:, :1]),
    lambda: x0_from_velocity(X, X[:1], S),
    lambda: noise_from_velocity(X, X, torch.ones(3)),
    *(lambda counts=counts: LatentLayout(*counts) for counts in ((0, 1), (1, -1), (1.5, 2), (True, 2))),
    *(lambda c=c, p=p: token_count(8, 8, spatial_compression=c, patch_size=p) for c, p in ((0, 1), (8, 0), (-8, 1))),
    lambda: token_count(0, 8, spatial_compression=8),
    lambda: grouped_mean(X, 0),
    lambda: grouped_mean(X[:, :0], 1),
    lambda: AlignmentLoss(LatentLayout(4, 0)),
    *(lambda maximum=maximum: gradient_ratio(X, X, maximum=maximum) for maximum in (-1.0, NAN)),
    lambda: gaussian_kl(X, X, reduction="max"),  # type: ignore[arg-type]
    lambda: ChannelStatistics(0),
    *(lambda config=config: latent_affine(config, 2) for config in (
        {"scaling_factor": 0.0}, {"scaling_factor": NAN}, {"shift_factor": INF},
        {"latents_mean": [0.0, 0.0], "latents_std": [1.0, 0.0]}, {"latents_mean": [0.0], "latents_std": [1.0]},
    )),
    lambda: to_raw(X, torch.zeros(4), torch.tensor([1.0, 1.0, 0.0, 1.0])),
    lambda: to_scaled(X, torch.zeros(3), torch.ones(3)),
]  # fmt: skip


@pytest.mark.parametrize("call", WRONG, ids=lambda call: inspect.getsource(call).strip()[:60])
def test_outside_a_domain(call: Callable[[], Any]) -> None:
    with pytest.raises(DavaeError):
        call()


def test_at_the_ends_of_the_domain() -> None:
    ends = torch.tensor([0.0, 1.0])
    for shift in (1e-3, 1e3):
        torch.testing.assert_close(shift_sigmas(ends, shift), ends, rtol=0, atol=2e-5)
    assert min_snr_weight(torch.tensor([-0.5, 0.0, 1.0, 1.5]), 5.0).tolist() == [5.0, 5.0, 0.0, 0.0]
    assert sample_unit(64, mean=60.0).max() < 1
    assert sample_unit(0).shape == (0,)
    assert interpolate(X, 0 * X, ends).mean(dim=(1, 2, 3)).tolist() == [1.0, 0.0]
    for t in (0, 9):
        bits = BOUND(X, X, data=X, noisy=X, timestep=torch.full((2,), t))
        assert bits.isfinite().all()
    DdpmProcess(LAYOUT, {"rescale_betas_zero_snr": True}).draw(
        X
    )  # without a learned variance it is a schedule like others


def test_every_public_function_is_looked_at() -> None:
    """A new one needs a line above, or stands here with the reason."""
    anything = {"scheduler_step", "adaptive_weight", "self_similarity", "gradient_scale"}  # or as gradient_ratio
    functions = {
        name
        for package in (davae.diffusion, davae.latents)
        for name in package.__all__
        if inspect.isfunction(getattr(package, name))
    }
    assert functions - anything <= set(globals())
