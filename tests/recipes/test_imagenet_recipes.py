"""The ImageNet track: what the recipes say, their dry runs, and a few steps of each in small."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from davae.bases.open import load_base
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.models import LightningDiTTransformer2DModel
from davae.pipelines import ClassConditionalPipeline
from davae.planner.recipes import dry_run
from davae.recipes.read import load_recipe
from davae.recipes.settings import BaseRecipe
from davae.training.base.train import dry_run_base
from davae.training.diffusion import ClassMap
from davae.training.runs.train import run_autoencoder, run_base, run_diffusion

QUICK = ["report_to=[]", "steps=2", "batch_size=2", "validation_images=2", "log_every=1", "precision=no"]


def quick(section: str) -> list[str]:
    return [f"{section}.loop.{change}" for change in QUICK]


def test_the_large_recipe_has_the_published_values() -> None:
    recipe = load_recipe("imagenet-512-davae")
    diffusion, autoencoder = recipe.diffusion, recipe.autoencoder
    assert diffusion.loop.batch_size * diffusion.loop.gradient_accumulation == 640
    assert autoencoder.loop.batch_size * autoencoder.loop.gradient_accumulation == 64
    assert diffusion.loss.detail_warmup_steps == 20_000
    assert diffusion.loss.cosine_weight == 1
    assert diffusion.tune.add_qk_norm
    assert diffusion.optimizer.learning_rate == 2e-4
    text = dry_run(recipe, "diffusion")
    assert "# image [3, 512, 512] -> latent [128, 16, 16]: 32 base and 96 detail channels" in text
    assert "256 tokens for 512 pixels instead of 1024" in text


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("imagenet-512-native", "# image [3, 512, 512] -> latent [32, 32, 32], patch 2 -> 256 tokens"),
        ("imagenet-small-base", "# image [3, 128, 128] -> latent [16, 8, 8], patch 1 -> 64 tokens"),
    ],
)
def test_dry_run_of_a_base_recipe_is_its_yaml_with_findings_in_comments(name: str, found: str) -> None:
    recipe = load_recipe(name)
    text = dry_run_base(recipe)
    assert yaml.safe_load(text) == recipe.model_dump(mode="json")
    assert found in text
    if name == "imagenet-512-native":
        assert "675.2M parameters" in text


def test_native_and_upgrade_have_the_same_tokens_and_steps() -> None:
    native, davae = load_recipe("imagenet-small-native"), load_recipe("imagenet-small-davae")
    assert native.transformer.loop == davae.diffusion.loop
    assert native.transformer.optimizer == davae.diffusion.optimizer
    assert native.data.resolution == davae.data.resolution


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["start_from.patch_size=3"], r"512 pixels are not a multiple of 48 .*; the nearest is 528"),
        (["start_from=null"], "autoencoder and transformer.architecture needed, or start_from"),
        (
            ["transformer.architecture={hidden_size: 16, num_layers: 1, num_attention_heads: 2}"],
            "transformer.architecture come from its pipeline: leave out",
        ),
    ],
)
def test_mistakes_are_told(overrides: list[str], message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        dry_run_base(load_recipe("imagenet-512-native", overrides))


def test_a_resolution_that_the_compression_does_not_divide_is_told_before_training(tmp_path: Path) -> None:
    small = ["data.path=procedural:4", "data.hold_out=2", "data.resolution=72"]
    with pytest.raises(DavaeError, match=r"36 pixels are not a multiple of 16 .*; the nearest is 32"):
        run_base("imagenet-small-base", small, tmp_path)
    native = [*small, "start_from.pipeline=debug", "data.resolution=36"]
    with pytest.raises(DavaeError, match=r"36 pixels are not a multiple of 8 .*; the nearest is 32"):
        run_base("imagenet-small-native", native, tmp_path)


def test_published_files_must_be_converted_first() -> None:
    with pytest.raises(DavaeError, match="convert them with `davae convert vavae`"):
        load_base("lightningdit-xl-1")


def test_classes_without_names_are_taken_in_their_order(caplog: pytest.LogCaptureFixture) -> None:
    pipe = debug_base()
    unnamed = ClassConditionalPipeline(vae=pipe.vae, transformer=pipe.transformer, scheduler=pipe.scheduler)
    count = pipe.transformer.config.num_classes
    assert ClassMap([f"n{i}" for i in range(count)], unnamed).numbers == list(range(count))
    assert ClassMap(["n0"], unnamed).numbers == [count]
    assert "all images are trained without a label" in caplog.text


def test_a_native_fine_tune_with_larger_patches_and_qk_norm(tmp_path: Path) -> None:
    base = debug_base()
    config = {k: v for k, v in base.transformer.config.items() if not k.startswith("_")}
    base.transformer = LightningDiTTransformer2DModel(**{**config, "qk_norm": False})
    base.save_pretrained(tmp_path / "base")
    data = ["data.path=procedural:16", "data.resolution=32", "data.hold_out=4"]
    start = [f"start_from.pipeline={tmp_path / 'base'}", "start_from.qk_norm=true"]
    sample = ["transformer.sample.num_inference_steps=2"]
    run_base("imagenet-small-native", [*data, *start, *quick("transformer"), *sample], tmp_path / "run")
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipe.transformer.config.patch_size == 2 * base.transformer.config.patch_size
    assert pipe.transformer.config.qk_norm
    assert pipe.labels == base.labels
    averaged = ClassConditionalPipeline.from_pretrained(tmp_path / "run" / "transformer" / "pipeline")
    learned = averaged.transformer.state_dict()
    assert all(torch.equal(value, learned[name]) for name, value in pipe.transformer.state_dict().items())
    kept = base.vae.state_dict()
    assert all(torch.equal(value, kept[name]) for name, value in pipe.vae.state_dict().items())
    assert pipe(0, num_inference_steps=1, output_type="pt").images.shape[-1] == 32


@pytest.mark.slow
def test_the_small_track_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, upgrade with QK-norm put in, and native, two steps each."""
    monkeypatch.chdir(tmp_path)
    data = ["data.path=procedural:16", "data.resolution=64", "data.hold_out=4"]
    run_base("imagenet-small-base", [*data, *quick("autoencoder"), *quick("transformer")])
    assert isinstance(load_recipe("imagenet-small-base"), BaseRecipe)
    run_autoencoder("imagenet-small-davae", [*data, *quick("autoencoder")])
    run_diffusion("imagenet-small-davae", [*data, *quick("diffusion"), "diffusion.tune.add_qk_norm=true"])
    run_base("imagenet-small-native", [*data, *quick("transformer")])
    upgraded = ClassConditionalPipeline.from_pretrained("runs/imagenet-small-davae-diffusion/pipeline")
    native = ClassConditionalPipeline.from_pretrained("runs/imagenet-small-native/pipeline")
    images = [pipe(0, num_inference_steps=1, output_type="pt").images for pipe in (upgraded, native)]
    assert images[0].shape == images[1].shape == (1, 3, 64, 64)
