"""The two processes: what they draw, and the identities that hold on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from davae.diffusion import DdpmProcess, FlowLoss, FlowProcess, NoiseProcess, NoisySample, x0_from_velocity
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.latents.prefixes import prefix_mask

LAYOUT = LatentLayout(1, 3)
FLOW = FlowProcess(FlowLoss(LAYOUT), scheme="uniform")
DDPM = DdpmProcess(LAYOUT, DDPMScheduler().config)


def data() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(64, 4, 2, 2)


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def test_flow() -> None:
    sample = FLOW.draw(data())
    assert torch.equal(sample.sigma_or_t, sample.sigma)
    assert torch.equal(sample.target, sample.noise - sample.data)
    torch.testing.assert_close(x0_from_velocity(sample.target, sample.noisy, sample.sigma), sample.data)


@pytest.mark.parametrize("process", [FLOW, FlowProcess(FlowLoss(LAYOUT, form="x0"), scheme="uniform"), DDPM])
def test_a_distilled_sample_has_the_teachers_target_in_the_base_channels_alone(process: NoiseProcess) -> None:
    """The noisy latent stays, the details too, and the loss has the gradient of both losses, mixed."""
    sample = process.draw(data())
    teacher = torch.randn(64, 1, 2, 2)
    assert torch.equal(process.distilled(sample, teacher, 0.0).target, sample.target)
    mixed, whole = process.distilled(sample, teacher, 0.25), process.distilled(sample, teacher, 1.0)
    torch.testing.assert_close(whole.target[:, :1], teacher)
    assert torch.equal(whole.target[:, 1:], sample.target[:, 1:])
    alpha = (1 - column(sample.sigma)) if isinstance(process, FlowProcess) else (1 - column(sample.sigma) ** 2).sqrt()
    for made in (mixed, whole):
        torch.testing.assert_close(alpha * made.data + column(made.sigma) * made.noise, sample.noisy, atol=1e-4, rtol=0)
    guess = torch.randn(64, 4, 2, 2, requires_grad=True)

    def gradient(of: NoisySample) -> Tensor:
        return torch.autograd.grad(process.loss(guess, of, 1.0), guess)[0]

    torch.testing.assert_close(gradient(mixed), 0.75 * gradient(sample) + 0.25 * gradient(whole), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("betas", [{}, {"beta_start": 0.00085, "beta_schedule": "scaled_linear"}])
def test_ddpm_is_the_schedulers(betas: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(**betas)
    sample = DdpmProcess(LAYOUT, scheduler.config).draw(data())
    assert sample.sigma_or_t.dtype == torch.long
    torch.testing.assert_close(sample.noisy, scheduler.add_noise(sample.data, sample.noise, sample.sigma_or_t))
    assert torch.equal(sample.target, sample.noise)


def test_ddpm_min_snr_caps_the_clean_samples() -> None:
    """``min(SNR, 5) / SNR`` by hand: SNR 20 counts a quarter, SNR 2 counts in full."""
    process = DdpmProcess(LAYOUT, {}, min_snr_gamma=5.0)
    process.alphas_cumprod = torch.tensor([20 / 21, 2 / 3])  # a / (1 - a) is the SNR
    sample = process.draw(torch.zeros(1, 4, 2, 2))
    for t, factor in ((0, 0.25), (1, 1.0)):
        at = replace(sample, sigma_or_t=torch.tensor([t]))
        assert float(process.loss(at.noise + 1, at, 1.0)) == pytest.approx(factor)


def test_only_noise_is_trained_by_ddpm() -> None:
    with pytest.raises(DavaeError, match="v_prediction"):
        DdpmProcess(LAYOUT, {"prediction_type": "v_prediction"})


def test_ddpm_keeps_the_variance_and_the_noise_gives_the_data_back() -> None:
    sample = DDPM.draw(data())
    alpha, sigma = DDPM.alphas_cumprod[sample.sigma_or_t].sqrt(), sample.sigma
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(64))
    x0_hat = (sample.noisy - column(sigma) * sample.target) / column(alpha)
    torch.testing.assert_close(x0_hat, sample.data, rtol=1e-3, atol=1e-3)  # alpha is 0.007 at the end
    # In the angle of alpha = cos, sigma = sin the velocity of Salimans and Ho 2022 gives both back.
    v = column(alpha) * sample.noise - column(sigma) * sample.data
    torch.testing.assert_close(column(alpha) * sample.noisy - column(sigma) * v, sample.data)
    torch.testing.assert_close(column(sigma) * sample.noisy + column(alpha) * v, sample.noise)


@pytest.mark.parametrize("process", [FLOW, DDPM], ids=["flow", "ddpm"])
def test_equation_13_on_what_was_drawn(process: NoiseProcess) -> None:
    """Base off by 2, details by 1, at half weight: (4 + 0.5 * 3) / (1 + 0.5 * 3)."""
    sample = process.draw(data())
    assert process.loss(sample.target, sample, 0.5) < 1e-12
    off = torch.tensor([2.0, 1.0, 1.0, 1.0]).view(1, 4, 1, 1)
    assert float(process.loss(sample.target + off, sample, 0.5)) == pytest.approx(2.2, rel=1e-5)


def test_levels_are_drawn_before_the_noise() -> None:
    """Without the noise the same levels come out: a cache of latents changes no draw."""
    shapes = [(3, 4, 2, 2), (3, 4, 8, 8)]
    for process in (FLOW, DDPM):
        drawn = []
        for shape in shapes:
            torch.manual_seed(1)
            drawn.append(process.draw(torch.zeros(shape)).sigma)
        assert torch.equal(*drawn)


def test_a_velocity_has_no_variance() -> None:
    sample = FLOW.draw(data())
    with pytest.raises(DavaeError, match="variance_weight=0"):
        FLOW.variance_loss(sample.target, sample.target, sample, 1.0)


@pytest.mark.parametrize("form", ["velocity", "x0", "cosine", "ddpm"])
def test_a_restricted_sample_has_the_loss_of_its_channels_alone(form: str) -> None:
    """Cutting the latent to two channels and training on those gives the same number, whatever the others hold."""

    def process(layout: LatentLayout) -> NoiseProcess:
        if form == "ddpm":
            return DdpmProcess(layout, DDPMScheduler().config, min_snr_gamma=5.0, cosine_weight=0.5)
        loss = FlowLoss(layout, form="x0", min_snr_gamma=5.0) if form == "x0" else FlowLoss(layout)
        return FlowProcess(replace(loss, cosine_weight=0.5) if form == "cosine" else loss)

    whole = process(LAYOUT).draw(data())
    parts = {name: getattr(whole, name)[:, :2] for name in ("data", "noise", "noisy", "target")}
    prediction = torch.randn(64, 4, 2, 2, requires_grad=True)
    kept = prefix_mask(torch.full((64,), 2), 4)
    sample = whole.restricted(kept)
    assert not sample.noisy[:, 2:].any()
    loss = process(LAYOUT).loss(prediction * kept, sample, 0.5)
    alone = process(LatentLayout(1, 1)).loss(prediction[:, :2], replace(whole, **parts), 0.5)
    torch.testing.assert_close(loss, alone)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert not gradient[:, 2:].any()
    assert gradient[:, :2].all()
