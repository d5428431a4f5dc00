"""The variational bound of a learned variance, against torch's distributions and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from davae.diffusion import DdpmProcess, NoisySample, VariationalBound
from davae.latents import LatentLayout

KEPT = DDPMScheduler().alphas_cumprod


def draw(timestep: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    data, noise, guess, variance = torch.randn(4, 2, 3, 4, 4, generator=generator)
    a = KEPT[timestep]
    return {
        "data": data.clamp(-1, 1),
        "noisy": a.sqrt() * data.clamp(-1, 1) + (1 - a).sqrt() * noise,
        "true": noise,
        "guess": guess,
        "variance": variance.tanh(),
        "timestep": torch.full((2,), timestep),
    }


@pytest.mark.parametrize("timestep", [1, 30, 999])
def test_the_divergence_is_that_of_the_two_reverse_steps(timestep: int) -> None:
    d = draw(timestep)
    kept, before = KEPT.double()[timestep], KEPT.double()[timestep - 1]
    beta = 1 - kept / before
    low = beta * (1 - before) / (1 - kept)

    def mean(noise: torch.Tensor) -> torch.Tensor:  # Ho et al. 2020, Eq. 11: another form of the same mean
        return (d["noisy"].double() - beta / (1 - kept).sqrt() * noise.double()) / (1 - beta).sqrt()

    share = (d["variance"].double() + 1) / 2
    std = (share * beta.log() + (1 - share) * low.log()).exp().sqrt()
    expected = kl_divergence(Normal(mean(d["true"]), low.sqrt()), Normal(mean(d["guess"]), std)) / math.log(2)
    found = VariationalBound(KEPT)(d["guess"], d["variance"], data=d["data"], noisy=d["noisy"], timestep=d["timestep"])
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-4)


def test_the_right_noise_and_the_lowest_variance_cost_nothing() -> None:
    d = draw(500)
    lowest = torch.full_like(d["variance"], -1.0)
    found = VariationalBound(KEPT)(d["true"], lowest, data=d["data"], noisy=d["noisy"], timestep=d["timestep"])
    assert found.abs().max() < 1e-4


def test_probabilities_of_all_values_of_a_last_step_sum_to_one() -> None:
    levels = torch.linspace(-1, 1, 256).view(256, 1, 1, 1)
    noisy = torch.full_like(levels, 0.3)
    bits = VariationalBound(KEPT)(
        torch.zeros_like(levels),
        torch.zeros_like(levels),
        data=levels,
        noisy=noisy,
        timestep=torch.zeros(256, dtype=torch.long),
    )
    assert float((2**-bits).sum()) == pytest.approx(1.0, abs=1e-4)


def test_it_moves_the_variance_and_never_the_noise() -> None:
    d = draw(100)
    guess, variance = d["guess"].requires_grad_(), d["variance"].requires_grad_()
    layout = LatentLayout(1, 2)
    process = DdpmProcess(layout, DDPMScheduler().config)
    sigma = (1 - KEPT[d["timestep"]]).sqrt()
    sample = NoisySample(d["data"], d["true"], d["noisy"], d["timestep"], sigma, d["true"])
    process.variance_loss(guess, variance, sample, weight=0.0).backward()
    assert guess.grad is None
    assert variance.grad[:, :1].abs().min() > 0
    assert variance.grad[:, 1:].count_nonzero() == 0  # the details' schedule holds here too
