import math

import pytest
import torch

from davae.evaluation import log_spectral_distance, radial_power_spectrum
from davae.evaluation.metrics.spectrum import SpectrumMean, radial_bins


@pytest.mark.parametrize("size", [(16, 16), (15, 15), (16, 24), (9, 40)])
def test_parseval(size: tuple[int, int]) -> None:
    x = torch.randn(3, 2, *size, generator=torch.Generator().manual_seed(0)) + 0.7
    frequency, power = radial_power_spectrum(x)
    index, centres = radial_bins(*size)
    assert torch.equal(frequency, centres)
    total = (power * torch.bincount(index.flatten())).sum() / (size[0] * size[1])
    torch.testing.assert_close(total, x.double().square().mean())


@pytest.mark.parametrize("cycles", [1, 3, 7])
def test_a_sinusoid_lands_in_its_ring(cycles: int) -> None:
    wave = torch.sin(2 * math.pi * cycles * torch.arange(32) / 32)
    for x in (wave.view(1, 1, 1, 32).expand(1, 1, 32, 32), wave.view(1, 1, 32, 1).expand(1, 1, 32, 32)):
        frequency, power = radial_power_spectrum(x)
        assert frequency[power.argmax()].item() == pytest.approx(cycles / 32)
        power[cycles] = 0
        assert power.max() < 1e-10


def test_white_noise_is_flat_at_its_variance() -> None:
    x = 0.5 * torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    _, power = radial_power_spectrum(x)
    torch.testing.assert_close(power[1:], torch.full_like(power[1:], 0.25), rtol=0.06, atol=0)


def test_log_distance_in_decibels() -> None:
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert log_spectral_distance(x, x) == 0
    assert log_spectral_distance(x, x * math.sqrt(2)) == pytest.approx(10 * math.log10(2), abs=1e-4)
    assert log_spectral_distance(x, x + 5) == pytest.approx(0, abs=1e-4)  # the mean is not counted


def test_gains_by_octave() -> None:
    x = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    loud = SpectrumMean().update(x * math.sqrt(2)).gains(SpectrumMean().update(x))
    assert loud == pytest.approx([10 * math.log10(2)] * 4, abs=1e-4)  # rings 5 to 8, 3 and 4, 2, 1
    waves = torch.fft.rfft2(x)
    index, _ = radial_bins(16, 16)
    waves[..., (index[:, :9] > 2) & (index[:, :9] <= 4)] *= 0.1
    quiet = SpectrumMean().update(torch.fft.irfft2(waves, s=(16, 16))).gains(SpectrumMean().update(x))
    assert quiet == pytest.approx([0, -20, 0, 0], abs=1e-3)
