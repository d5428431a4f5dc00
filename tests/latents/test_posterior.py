from __future__ import annotations

import pytest
import torch

from davae.errors import DavaeError
from davae.latents import gaussian_kl


def test_sum_is_the_divergence_of_torch() -> None:
    mean, logvar = torch.randn(3, 4, 2, 5), torch.randn(3, 4, 2, 5)
    ours = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    unit = torch.distributions.Normal(torch.zeros_like(mean), 1.0)
    expected = torch.distributions.kl_divergence(ours, unit).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(gaussian_kl(mean, logvar), expected)


def test_mean_has_no_half() -> None:
    mean, logvar = torch.full((2, 1, 2, 2), 3.0), torch.zeros(2, 1, 2, 2)
    assert gaussian_kl(mean, logvar, reduction="mean") == 9.0
    assert gaussian_kl(mean, logvar, reduction="sum") == 0.5 * 9.0 * 4


def test_float32_even_for_bfloat16_and_zero_for_the_standard_normal() -> None:
    zero = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    assert gaussian_kl(zero, zero) == 0.0
    assert gaussian_kl(zero, zero).dtype == torch.float32


def test_unknown_reduction() -> None:
    with pytest.raises(DavaeError, match="'batch'"):
        gaussian_kl(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), reduction="batch")  # type: ignore[arg-type]
