from __future__ import annotations

import pytest
import torch

from davae.diffusion import sample_sigmas, sample_unit, sd3_sigma_table, shift_sigmas
from davae.errors import DavaeError


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_logit_normal_quantiles() -> None:
    u = sample_unit(200_000, generator=seeded(), mean=0.5, std=1.5)
    share = (torch.logit(u) - 0.5) / 1.5  # a standard normal again
    assert share.mean().item() == pytest.approx(0, abs=0.01)
    assert share.std().item() == pytest.approx(1, abs=0.01)


def test_uniform() -> None:
    u = sample_unit(200_000, "uniform", generator=seeded())
    assert torch.histc(u, 10, 0, 1).div(20_000).sub(1).abs().max() < 0.03
    assert u.max() < 1


def test_seeded_and_without_touching_the_global_state() -> None:
    state = torch.get_rng_state()
    assert torch.equal(sample_sigmas(5, generator=seeded()), sample_sigmas(5, generator=seeded()))
    assert torch.equal(torch.get_rng_state(), state)


def test_shift() -> None:
    sigma = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(shift_sigmas(sigma, 3.0), torch.tensor([0.0, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(shift_sigmas(shift_sigmas(sigma, 3.0), 1 / 3), sigma)
    # Shifting t = 1 - sigma by s is shifting sigma by 1 / s.
    torch.testing.assert_close(1 - shift_sigmas(1 - sigma, 0.3), shift_sigmas(sigma, 1 / 0.3))


def test_sigmas_are_shifted() -> None:
    plain = sample_sigmas(1000, generator=seeded())
    torch.testing.assert_close(sample_sigmas(1000, generator=seeded(), shift=3.0), shift_sigmas(plain, 3.0))


def test_official_table() -> None:
    table = sd3_sigma_table()
    assert len(table) == 1000
    assert table.sigmas[0] == 1
    assert table.sigmas.diff().max() < 0
    # 1/1000 shifted by 3 and the grid between, then by 4: not 4/1003.
    smallest = 3 / 1002
    assert table.sigmas[-1].item() == pytest.approx(4 * smallest / (1 + 3 * smallest), rel=1e-5)
    sigmas, timesteps = table.look_up(torch.tensor([0.0, 0.5, 0.99999, 1.0]))
    assert timesteps.dtype == torch.int64
    assert timesteps.tolist() == [1000, int(table.timesteps[500]), 11, 11]
    torch.testing.assert_close(sigmas, table.sigmas[[0, 500, 999, 999]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sample_unit(1, "normal"), "'normal': use logit_normal or uniform"),
        (lambda: sample_unit(1, std=0.0), "must be positive"),
        (lambda: shift_sigmas(torch.ones(1), 0.0), "shift must be positive"),
    ],
)
def test_refusals(make, message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        make()
