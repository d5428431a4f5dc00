"""Latent statistics measured before an autoencoder is written."""

import pytest
import torch
from torch.utils.data import Dataset

import davae.training.statistics as statistics
from davae.data import as_item_dataset
from davae.latents import ChannelStatistics
from davae.training.statistics import measure_latents


class Noise(Dataset):
    """Images of unit noise in two sizes; from ``shifted_from`` on they are brighter."""

    def __init__(self, count: int, shifted_from: int | None = None) -> None:
        self.count, self.shifted_from = count, shifted_from

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        side = 96 if index % 3 else 120
        image = torch.randn(3, side, side, generator=torch.Generator().manual_seed(index))
        if self.shifted_from is not None and index >= self.shifted_from:
            image = image + 1
        return {"image": image, "label": -1, "caption": "", "id": str(index), "skipped": []}


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_ROUND", 16)


@pytest.mark.parametrize(
    ("count", "most", "shifted_from", "seen"),
    [
        (10, None, None, 10),  # less than a round
        (200, 40, None, 32),  # still after the second of three rounds
        (200, 30, None, 30),
        (48, None, 16, 48),  # never still
    ],
)
def test_rounds_go_on_until_statistics_stand_still(
    count: int, most: int | None, shifted_from: int | None, seen: int
) -> None:
    dataset = as_item_dataset(Noise(count, shifted_from))
    calls: list[tuple[int, ...]] = []

    def encode(images: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(images.shape))
        return images * torch.tensor([1.0, 2.0, 3.0])[:, None, None] + 0.5

    measured = measure_latents(dataset, encode, 3, most=most)
    expected = ChannelStatistics(3)
    for i in range(seen):
        expected.update(encode(dataset[i]["image"][None]))
    calls = calls[: len(calls) - seen]
    assert sum(shape[0] for shape in calls) == seen
    assert measured.count == expected.count
    torch.testing.assert_close(measured.mean, expected.mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(measured.std, expected.std, rtol=1e-10, atol=1e-10)


def test_all_elements_together_are_those_of_one_channel() -> None:
    values = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    found = ChannelStatistics(3)
    found.update(values)
    mean, std = found.of_all_elements()
    assert mean == pytest.approx(float(values.double().mean()), abs=1e-12)
    assert std == pytest.approx(float(values.double().std(unbiased=False)), abs=1e-12)
