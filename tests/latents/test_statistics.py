from __future__ import annotations

import pytest
import torch

from davae.errors import DavaeError
from davae.latents import ChannelStatistics


def measured(latents: torch.Tensor, *sizes: int) -> ChannelStatistics:
    statistics = ChannelStatistics(latents.shape[1])
    for part in latents.split(list(sizes)):
        statistics.update(part)
    return statistics


@pytest.fixture
def latents() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(7, 3, 4, 5, generator=generator, dtype=torch.float64)
    scale = torch.tensor([1.0, 1e-3, 100.0], dtype=torch.float64)[:, None, None]
    return noise * scale + torch.tensor([0.0, 1e4, -5.0], dtype=torch.float64)[:, None, None]


def test_uneven_batches_give_the_exact_statistics(latents: torch.Tensor) -> None:
    statistics = measured(latents, 1, 4, 2)
    values = latents.transpose(0, 1).flatten(1)
    assert statistics.count == 7 * 20
    assert statistics.mean.dtype == torch.float64
    torch.testing.assert_close(statistics.mean, values.mean(dim=1), rtol=1e-13, atol=1e-13)
    # the second channel's deviation is 1e-7 of its mean: a sum of squares would have lost it
    torch.testing.assert_close(statistics.std, values.std(dim=1, correction=0), rtol=1e-8, atol=0)


def test_merging_and_resuming_equal_one_run(latents: torch.Tensor) -> None:
    whole, first, second = measured(latents, 7), measured(latents[:3], 3), measured(latents[3:], 4)
    resumed = ChannelStatistics(3)
    resumed.load_state_dict(first.state_dict())
    resumed.merge(second)
    resumed.merge(ChannelStatistics(3))  # nothing seen: nothing changes
    assert resumed.count == whole.count
    torch.testing.assert_close(resumed.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(resumed.std, whole.std, rtol=1e-8, atol=0)


def test_errors() -> None:
    statistics = ChannelStatistics(2)
    with pytest.raises(DavaeError, match="no latent has been measured"):
        _ = statistics.mean
    with pytest.raises(DavaeError, match="3 channels, the statistics 2"):
        statistics.update(torch.zeros(1, 3, 2, 2))
    with pytest.raises(DavaeError, match=r"channel 1 .* not finite"):
        statistics.update(torch.tensor([0.0, float("nan")])[None, :, None, None])
    with pytest.raises(DavaeError, match="3 channels into 2"):
        statistics.merge(ChannelStatistics(3))
    with pytest.raises(DavaeError, match="3 channels into 2"):
        statistics.load_state_dict(ChannelStatistics(3).state_dict())
