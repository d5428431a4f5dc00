"""The fitted start in a training: once, before the first step, from training images that the seed chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from davae.bases.tiny import debug_base
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.recipes.read import load_recipe
from davae.recipes.settings import UpgradeRecipe
from davae.training.autoencoder import fit
from davae.training.autoencoder.fit import fit_levels
from davae.training.autoencoder.train import new_level, train_levels

QUICK = (
    "autoencoder.model.start=fitted",
    "autoencoder.start_images=6",
    "autoencoder.loop.steps=2",
    "autoencoder.loop.checkpoint_every=1",
)


def recipe(*overrides: str) -> UpgradeRecipe:
    found = load_recipe("debug", [*QUICK, *overrides])
    assert isinstance(found, UpgradeRecipe)
    return found


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is fitted: the level's number, and its images."""
    calls: list[dict[str, Any]] = []
    real = fit.fit_start

    def fit_start(vae: AutoencoderDA, images: Any, **options: Any) -> None:
        given = list(images)
        calls.append({"level": vae.levels[-1].number, "images": torch.cat(given), **options})
        real(vae, given, **options)

    monkeypatch.setattr(fit, "fit_start", fit_start)
    return calls


def test_it_happens_once_and_not_where_a_run_goes_on(tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    train_levels(recipe(), debug_base().vae, tmp_path / "run")
    assert [call["level"] for call in fits] == [1]
    assert fits[0]["images"].shape == (6, 3, 32, 32)
    result = train_levels(recipe("autoencoder.loop.steps=3"), debug_base().vae, tmp_path / "run")
    assert len(fits) == 1
    whole = train_levels(recipe("autoencoder.loop.steps=3"), debug_base().vae, tmp_path / "whole")
    assert len(fits) == 2
    resumed, straight = (AutoencoderDA.from_pretrained(r.result).state_dict() for r in (result, whole))
    assert all(torch.equal(value, straight[name]) for name, value in resumed.items())


def test_a_start_from_a_trained_autoencoder_is_not_fitted(tmp_path: Path, fits: list[dict[str, Any]]) -> None:
    train_levels(recipe(), debug_base().vae, tmp_path / "first")
    train_levels(recipe(f"autoencoder.start_from={tmp_path / 'first'}"), debug_base().vae, tmp_path / "second")
    assert len(fits) == 1


@pytest.mark.parametrize("order", ["sequential", "together"])
def test_each_level_is_fitted_to_images_of_its_resolution(
    order: str, tmp_path: Path, fits: list[dict[str, Any]]
) -> None:
    nested = recipe(
        "autoencoder.model.scale=4",
        "autoencoder.model.detail_channels=[8,16]",
        "data.resolution=64",
        f"autoencoder.levels={order}",
        "autoencoder.alignment.target=prefix",
    )
    train_levels(nested, debug_base().vae, tmp_path / "run")
    assert [(call["level"], call["images"].shape[-1], call["aligned_channels"]) for call in fits] == [
        (1, 32, 4),
        (2, 64, 12),
    ]


def test_images_are_those_of_the_seed_whatever_the_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = recipe().autoencoder
    images = open_dataset("procedural:12", resolution=32)
    seen: list[Tensor] = []
    monkeypatch.setattr(fit, "fit_start", lambda _, given, **__: seen.extend(given))
    vae = new_level(debug_base().vae, settings.model, 8)
    fit_levels(vae, [1], settings, images)
    alone, seen[:] = list(seen), []
    for rank in range(3):
        monkeypatch.setattr(fit, "rank_and_world", lambda rank=rank: (rank, 3))
        fit_levels(vae, [1], settings, images)
    assert len(alone) == len(seen) == 6
    assert all(any(torch.equal(image, other) for other in seen) for image in alone)
    other = recipe("autoencoder.loop.seed=1").autoencoder
    monkeypatch.setattr(fit, "rank_and_world", lambda: (0, 1))
    seen.clear()
    fit_levels(vae, [1], other, images)
    assert not all(any(torch.equal(image, other) for other in seen) for image in alone)


@pytest.mark.parametrize(("earlier", "start"), [("true", "warm"), ("false", "random")])
def test_warm_blocks_of_earlier_recipes_are_read(earlier: str, start: str) -> None:
    values = load_recipe("sd35-medium-1024").model_dump(mode="json")
    assert values["autoencoder"]["model"]["start"] == "fitted"
    found = load_recipe("imagenet-small-davae", [f"autoencoder.model.warm_blocks={earlier}"])
    assert isinstance(found, UpgradeRecipe)
    assert found.autoencoder.model.start == start
    with pytest.raises(DavaeError, match="warm_blocks is now start: remove it"):
        load_recipe("sd35-medium-1024", [f"autoencoder.model.warm_blocks={earlier}"])
