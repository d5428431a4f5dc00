"""Training nested details: what learns when, what is logged, and what a person gets from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from davae.bases.tiny import debug_base, load_tiny
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.latents import AlignmentLoss, ChannelStatistics
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.upgrade import layout_over
from davae.recipes.read import load_recipe
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.resizing import upscaled
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.autoencoder.stage import AutoencoderStage, upscaled_base
from davae.training.autoencoder.train import new_level
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.data import mean_psnr, rank_share_of_images
from davae.training.loop.loop import train
from davae.training.runs.train import train_autoencoder, train_diffusion

NESTED = [
    "data.resolution=64",
    "data.path=procedural:12",
    "data.hold_out=4",
    "autoencoder.model.scale=4",
    "autoencoder.model.detail_channels=[8,16]",
    "autoencoder.statistics_images=8",
    "autoencoder.loop.steps=2",
    "autoencoder.loop.validation_images=4",
    "autoencoder.loop.validate_every=0",
]


def _recipe(*overrides: str) -> UpgradeRecipe:
    recipe = load_recipe("debug", [*NESTED, *overrides])
    assert isinstance(recipe, UpgradeRecipe)
    return recipe


@pytest.fixture(scope="module")
def sequential(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sequential")
    train_autoencoder(_recipe(), out)
    return out


def test_sequential_levels_leave_the_earlier_one_untouched(sequential: Path) -> None:
    first = AutoencoderDA.from_pretrained(sequential / "level-1" / "autoencoder")
    both = AutoencoderDA.from_pretrained(sequential / "autoencoder")
    assert (first.scale, both.scale) == (2, 4)
    lower = both.at_level(1)
    expected = first.state_dict()
    assert lower.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in lower.state_dict().items())
    assert first.config.detail_mean == lower.config.detail_mean is not None
    assert both.config.detail_mean is not None
    names = set().union(*read_metrics(sequential / "metrics.jsonl"))
    assert {"level2_l1", "level2_alignment", "level2_gan", "psnr_level1_upscaled", "psnr"} <= names
    assert not any(name.startswith("level1_") for name in names)
    assert "l1" in set().union(*read_metrics(sequential / "level-1" / "metrics.jsonl"))


def test_levels_together_all_learn_and_are_measured(tmp_path: Path) -> None:
    result = train_autoencoder(_recipe("autoencoder.levels=together"), tmp_path)
    vae = AutoencoderDA.from_pretrained(result.result)
    names = set().union(*read_metrics(tmp_path / "metrics.jsonl"))
    for term in ("l1", "reconstruction", "kl", "alignment", "gan"):
        assert {f"level1_{term}", f"level2_{term}"} <= names
    assert {"discriminator_level1_total", "discriminator_level2_total"} <= names
    assert not (tmp_path / "level-1").exists()
    base = debug_base().vae
    start = new_level(base, _recipe().autoencoder.model, 8)
    assert not torch.equal(vae.at_level(1).down.conv.weight, start.down.conv.weight)
    assert all(torch.equal(v, base.state_dict()[k]) for k, v in vae.base_vae.state_dict().items())
    # Both levels' statistics are those of the trained encoders.
    images = rank_share_of_images(open_dataset("procedural:12", resolution=64, hold_out=4), 8)[0]
    statistics = ChannelStatistics(24)
    with torch.no_grad():
        statistics.update(vae.encode_details(images).mean)
    mean, std = vae.detail_statistics()
    assert torch.allclose(mean.double(), statistics.mean, atol=1e-4)
    assert torch.allclose(std.double(), statistics.std, rtol=1e-3)


def test_a_level_can_be_added_to_a_trained_autoencoder(sequential: Path, tmp_path: Path) -> None:
    folder = sequential / "level-1" / "autoencoder"
    added = train_autoencoder(_recipe(f"autoencoder.model.start_from={folder}"), tmp_path / "added")
    assert not (tmp_path / "added" / "level-1").exists()
    made, expected = (AutoencoderDA.from_pretrained(f).state_dict() for f in (added.result, sequential / "autoencoder"))
    assert all(torch.equal(value, expected[name]) for name, value in made.items())
    with pytest.raises(DavaeError, match=r"start_from: the levels of .* add \[8\] .* the recipe asks for \[16, 16\]"):
        train_autoencoder(
            _recipe(f"autoencoder.model.start_from={folder}", "autoencoder.model.detail_channels=[16,16]"),
            tmp_path / "other",
        )


def test_a_tuned_pipeline_is_upgraded_by_a_further_level(sequential: Path, tmp_path: Path) -> None:
    """Level 1 tuned first: its pipeline is then the base, its transformer's channels the base channels."""
    debug = debug_base()
    level1 = AutoencoderDA.from_pretrained(sequential / "level-1" / "autoencoder")
    both = AutoencoderDA.from_pretrained(sequential / "autoencoder")
    once = upgrade_pipeline(debug, level1)
    assert (layout_over(debug.vae, both).base_channels, layout_over(debug.vae, both).detail_channels) == (
        4,
        24,
    )
    assert (layout_over(once.vae, both).base_channels, layout_over(once.vae, both).detail_channels) == (
        12,
        16,
    )
    twice, direct = upgrade_pipeline(once, both), upgrade_pipeline(debug, both)
    noisy, time, label = torch.randn(2, 28, 4, 4), torch.rand(2), torch.tensor([1, 2])
    with torch.no_grad():
        for pipe in (twice, direct):
            predicted = pipe.transformer(noisy, time, label).sample
            expected = debug.transformer(noisy[:, :4], time, label).sample
            assert torch.allclose(predicted[:, :4], expected, atol=1e-5)
            assert not predicted[:, 4:].any()
    with pytest.raises(DavaeError, match="upgraded before, to scale 4"):
        upgrade_pipeline(twice, both)
    level1.set_detail_statistics(torch.zeros(8), torch.full((8,), 9.0))
    with pytest.raises(DavaeError, match="mean of its lower levels' details"):
        upgrade_pipeline(upgrade_pipeline(debug, level1), both)

    once.save_pretrained(tmp_path / "once")  # and the same through recipes: a further level on a pipeline's folder
    level1 = AutoencoderDA.from_pretrained(sequential / "level-1" / "autoencoder")
    upgrade_pipeline(debug, level1).save_pretrained(tmp_path / "base")
    recipe = _recipe(
        f"base={tmp_path / 'base'}",
        "autoencoder.model.scale=2",
        "autoencoder.model.detail_channels=16",
        "diffusion.loop.steps=1",
        "diffusion.loop.validation_images=1",
    )
    result = train_autoencoder(recipe, tmp_path / "autoencoder")
    assert AutoencoderDA.from_pretrained(result.result).scale == 4
    tuned = train_diffusion(recipe, tmp_path / "diffusion", result.result)
    assert (tuned.result / "transformer").is_dir()
    together = recipe.model_copy(update={"autoencoder": recipe.autoencoder.model_copy(update={"levels": "together"})})
    with pytest.raises(DavaeError, match="would change the levels that the base pipeline was tuned on"):
        train_autoencoder(together, tmp_path / "refused")


def test_what_a_recipe_may_say() -> None:
    with pytest.raises(DavaeError, match="2 levels of detail_channels make a scale of 4, not 2"):
        load_recipe("debug", ["autoencoder.model.detail_channels=[8,16]"])
    with pytest.raises(DavaeError, match="detail_channels"):
        load_recipe("debug", ["autoencoder.model.detail_channels=[]"])


def _objective(*overrides: str, together: bool) -> tuple[AutoencoderDA, StructuredObjective]:
    settings = _recipe(
        "autoencoder.reconstruction.gan.weight=0", "autoencoder.alignment.adaptive=false", *overrides
    ).autoencoder
    torch.manual_seed(0)
    vae = new_level(new_level(debug_base().vae, settings.model, 8), settings.model, 16)
    vae.train_levels(together=together)
    return vae, StructuredObjective(vae, settings.alignment, settings.reconstruction)


@pytest.mark.parametrize("target", ["base", "prefix"])
@torch.no_grad()
def test_alignment_against_the_base_or_everything_below(target: str) -> None:
    vae, objective = _objective(f"autoencoder.alignment.target={target}", together=False)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    below = vae.encode_prefix(images)
    torch.manual_seed(1)
    z_d = vae.encode_own_details(images).sample()
    torch.manual_seed(1)
    found = objective({"image": images}, 0)["level2_alignment"]
    known = below[:, :4] if target == "base" else below
    layout = vae.own_layout if target == "prefix" else type(vae.own_layout)(4, 16)
    assert layout.base_channels == known.shape[1]
    torch.testing.assert_close(found, AlignmentLoss(layout)(z_d, vae.alignment_target(known)))


def test_together_the_upper_level_teaches_the_lower_encoder() -> None:
    """The loss of level 2 reaches the details of level 1, which its decoder sees; alignment never does."""
    options = ("autoencoder.model.start=random", "autoencoder.model.detail_dropout=0")  # no zero weights
    vae, objective = _objective(*options, together=True)
    batch = {"image": torch.rand(1, 3, 64, 64) * 2 - 1}
    terms = objective(batch, 0)
    weight = vae.at_level(1).down.conv.weight
    for name, reaches in (("level2_l1", True), ("level1_l1", True), ("level2_alignment", False)):
        gradient = torch.autograd.grad(terms[name], weight, retain_graph=True, allow_unused=True)[0]
        assert (gradient is not None and bool(gradient.any())) == reaches, name
    total = sum(
        terms[f"level{n}_{k}"] * w
        for n in (1, 2)
        for k, w in (
            ("reconstruction", 1.0),
            ("kl", objective.settings.kl_weight),
            ("alignment", objective.alignment_settings.weight),
        )
    )
    torch.testing.assert_close(terms["total"], total)


def test_psnr_of_photographs_rises_with_each_level(real_images: Path, tmp_path: Path) -> None:
    """A short training on the embedded base, 32 px to 128 px; held-out images, all compared at 128 px."""
    settings = load_recipe(
        "tiny-nested",
        [
            "autoencoder.loop.steps=30",
            "autoencoder.optimizer.lr_warmup_steps=5",
            "autoencoder.loop.batch_size=1",
            "autoencoder.loop.report_to=[]",
            "autoencoder.loop.checkpoint_every=30",
            "autoencoder.loop.validation_images=8",
            "autoencoder.statistics_images=8",
            "autoencoder.loop.ema_decay=0.9",
        ],
    ).autoencoder  # type: ignore[union-attr]
    base = vae = load_tiny().vae
    for number, channels in enumerate(settings.model.detail_channels, start=1):
        torch.manual_seed(0)
        vae = new_level(vae, settings.model, channels)
        train_set, held_out = (
            open_dataset(real_images / "classes", resolution=32 * 2**number, hold_out=8, part=part)
            for part in ("train", "held_out")
        )
        train(AutoencoderStage(vae, settings, train_set, held_out), tmp_path / str(number), {})
        vae = AutoencoderDA.from_pretrained(tmp_path / str(number) / "autoencoder")
    images, _ = rank_share_of_images(held_out, 8)
    with torch.no_grad():
        latent = vae.encode(images).latent_dist.mode()
        made = [upscaled(vae.decode_level(latent, level), images.shape[-2:]) for level in range(3)]
        small = vae.downsample(images)
        assert torch.equal(vae.decode_level(latent, 0), base.decode(base.encode(small).latent_dist.mode()).sample)
        assert torch.equal(upscaled_base(vae, images), made[0])
    psnr = [mean_psnr(images, each) for each in made]
    assert psnr[1] > psnr[0] + 0.3, psnr
    assert psnr[2] > psnr[1] + 0.3, psnr
