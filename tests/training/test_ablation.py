"""An ablation trains what differs, once, with every seed, and compares like with like."""

import json

import pytest
import torch
from typer.testing import CliRunner

from davae.bases.tiny import debug_base
from davae.cli.main import app
from davae.errors import DavaeError
from davae.experiments.ablation import Spread, ablate
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.families import family_of
from davae.recipes.read import load_recipe
from davae.training.diffusion.tuning import select_trained
from davae.warm_start import new_channel_masks


def test_spread_by_hand():
    spread = Spread.of([1.0, 2.0, 6.0])
    assert spread.mean == 3.0
    assert spread.std == pytest.approx(7.0**0.5)
    assert Spread.of([4.0]).std == 0.0


def test_variants_share_autoencoders_and_a_second_call_does_nothing(tmp_path, monkeypatch):
    recipe = load_recipe("ablation-debug")
    result = ablate(recipe, tmp_path)
    assert list(result.variants) == list(recipe.variants)
    assert len(list((tmp_path / "autoencoders").iterdir())) == 4  # two seeds, with and without alignment
    full, unscheduled = result.variants["full"], result.variants["without schedule"]
    assert full["autoencoder_psnr"] == unscheduled["autoencoder_psnr"]
    assert len(full["swd/finest"].values) == 2
    assert full["swd/finest"].values[0] != full["swd/finest"].values[1]
    assert json.loads((tmp_path / "ablation.json").read_text())["seeds"] == [0, 1]

    def refuse(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr("davae.experiments.ablation.train_diffusion", refuse)
    monkeypatch.setattr("davae.experiments.ablation.train_autoencoder", refuse)
    assert ablate(recipe, tmp_path).variants == result.variants
    with pytest.raises(DavaeError, match=r"another ablation \(samples differ\)"):
        ablate(load_recipe("ablation-debug", ["samples=13"]), tmp_path)


def test_a_random_start_is_random_in_the_new_channels_only():
    base = debug_base()
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    settings = load_recipe("debug", ["diffusion.tune.new_channels_start=random"]).diffusion
    zero, random = (upgrade_pipeline(base, vae).transformer for _ in range(2))
    select_trained(random, family_of(base), vae.layout, settings)
    before, after = dict(zero.named_parameters()), dict(random.named_parameters())
    masks = new_channel_masks(zero, vae.layout)
    for name, weight in after.items():
        mask = masks.get(name, torch.zeros_like(weight, dtype=torch.bool))
        assert torch.equal(weight[~mask], before[name][~mask])
        if mask.any() and weight.ndim > 1:
            spread = float(before[name][~mask].detach().std())
            assert float(weight[mask].detach().std()) == pytest.approx(spread, rel=0.2)


def test_the_verb_prints_a_table_and_draws(tmp_path):
    arguments = ["ablate", "--recipe", "ablation-debug", "--out", str(tmp_path), "seeds=[0]"]
    arguments += ["variants={full: [], constant: [diffusion.loss.detail_schedule=constant]}"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "1 seed, 12 samples" in done.output
    assert "real images" in done.output
    assert (tmp_path / "ablation.png").is_file()
    with pytest.raises(DavaeError, match="kind 'upgrade', not an ablation"):
        CliRunner().invoke(app, ["ablate", "--recipe", "debug"], catch_exceptions=False)
