"""One sign: the path, its velocity, what a velocity implies, and diffusers' schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from davae.bases.tiny import debug_base
from davae.diffusion import (
    interpolate,
    noise_from_velocity,
    scheduler_step,
    set_sigmas,
    velocity_of,
    x0_from_velocity,
)
from davae.pipelines.class_conditional import guided_velocity, predict_velocity
from davae.pipelines.families import family_of

LEVELS = torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])  # both ends, and between


def draw(seed: int) -> Tensor:
    return torch.randn(len(LEVELS), 3, 4, 4, generator=torch.Generator().manual_seed(seed))


DATA, NOISE = draw(0), draw(1)


def test_the_path_runs_from_data_to_noise_and_moves_with_its_velocity() -> None:
    x = interpolate(DATA, NOISE, LEVELS)
    assert torch.equal(x[0], DATA[0])
    assert torch.equal(x[-1], NOISE[-1])
    velocity = velocity_of(DATA, NOISE)
    torch.testing.assert_close(interpolate(DATA, NOISE, LEVELS + 0.1), x + 0.1 * velocity)


def test_by_hand() -> None:
    data, noise, sigma = torch.tensor([[2.0]]), torch.tensor([[-1.0]]), torch.tensor([0.25])
    assert interpolate(data, noise, sigma).item() == 1.25  # 0.75 * 2 + 0.25 * -1
    assert velocity_of(data, noise).item() == -3.0


def test_velocity_data_and_noise_imply_each_other_at_both_ends_and_between() -> None:
    x = interpolate(DATA, NOISE, LEVELS)
    velocity = velocity_of(DATA, NOISE)
    x0_hat, noise_hat = x0_from_velocity(velocity, x, LEVELS), noise_from_velocity(velocity, x, LEVELS)
    torch.testing.assert_close(x0_hat, DATA)
    torch.testing.assert_close(noise_hat, NOISE)
    torch.testing.assert_close(velocity_of(x0_hat, noise_hat), velocity)
    # For any velocity, right or wrong: what it implies lies on a path through x with that velocity.
    wrong = draw(2)
    x0_hat, noise_hat = x0_from_velocity(wrong, x, LEVELS), noise_from_velocity(wrong, x, LEVELS)
    torch.testing.assert_close(velocity_of(x0_hat, noise_hat), wrong)
    torch.testing.assert_close(interpolate(x0_hat, noise_hat, LEVELS), x)


def test_what_is_implied_is_float32_whatever_the_prediction() -> None:
    x, velocity = DATA.bfloat16(), NOISE.bfloat16()
    assert x0_from_velocity(velocity, x, LEVELS).dtype == torch.float32
    assert noise_from_velocity(velocity, x, LEVELS).dtype == torch.float32


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_diffusers_walks_along_the_velocity_to_the_data(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = set_sigmas(scheduler, 4, torch.device("cpu"))
    assert sigmas[0] == 1
    latents = NOISE
    for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=True):
        expected = interpolate(DATA, NOISE, torch.full((len(DATA),), sigma))
        torch.testing.assert_close(latents, expected)
        latents = scheduler_step(scheduler, velocity_of(DATA, NOISE), timestep, latents, None)
    torch.testing.assert_close(latents, DATA)


class CountsFromNoise(nn.Module):
    """Knows data and noise, and speaks as LightningDiT: ``data - noise`` at ``t`` = 1 - sigma, 0 at noise."""

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor) -> Transformer2DModelOutput:
        torch.testing.assert_close(x, t.view(-1, 1, 1, 1) * DATA + (1 - t).view(-1, 1, 1, 1) * NOISE)
        return Transformer2DModelOutput(sample=DATA - NOISE)


def test_a_model_of_the_other_sign_and_time_is_turned_at_its_edge() -> None:
    """The family (training) and the pipeline (sampling) hand out what the process learns by."""
    x, labels = interpolate(DATA, NOISE, LEVELS), torch.zeros(len(LEVELS), dtype=torch.long)
    velocity = velocity_of(DATA, NOISE)
    assert torch.equal(predict_velocity(CountsFromNoise(), x, LEVELS, labels), velocity)
    family = family_of(debug_base())
    assert torch.equal(family.predict(CountsFromNoise(), x, LEVELS, {"class_labels": labels}), velocity)
    half = interpolate(DATA, NOISE, torch.full((len(DATA),), 0.5))
    assert torch.equal(guided_velocity(CountsFromNoise(), half, 0.5, labels), velocity)
