"""What a message advises works when it is followed: the settings it names are read, and a run may go on with them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.training.test_foundations import SMALL, _images
from tests.training.test_loop import _Stage

from davae.bases.debug_pipelines import small_pipeline
from davae.errors import DavaeError
from davae.pipelines.families import family_of
from davae.recipes.loop import LoopSettings
from davae.recipes.read import load_recipe, resumable_keys
from davae.recipes.settings import UpgradeRecipe
from davae.training.loop.bad_steps import NonFiniteGuard, out_of_memory_message
from davae.training.runs.train import check_upgrade, run_autoencoder, run_diffusion, train_autoencoder, train_diffusion

_SETTING = re.compile(r"\b((?:autoencoder|diffusion|data)(?:\.\w+)+)=(\[[^\]]*\]|[\w./-]+)")


def _settings(message: str) -> list[str]:
    """The ``section.key=value`` in a message."""
    return [f"{key}={value}" for key, value in _SETTING.findall(message)]


def _recipe(overrides: list[str], recipe: str = "debug") -> UpgradeRecipe:
    found = load_recipe(recipe, overrides)
    assert isinstance(found, UpgradeRecipe)
    return found


@pytest.mark.parametrize(
    ("recipe", "wrong", "section", "message", "right"),
    [
        (
            "debug",
            "autoencoder.loop.best_metric=pnsr",
            "autoencoder",
            "one of psnr,",
            "autoencoder.loop.best_metric=psnr",
        ),
        (
            "debug",
            "diffusion.loop.best_metric=fid",
            "diffusion",
            "held_out_total",
            "diffusion.loop.best_metric=swd/finest",
        ),
        (
            "debug",
            "autoencoder.loop.best_metric=psnr data.hold_out=0",
            "autoencoder",
            "no image is held out",
            "autoencoder.loop.best_metric=null",
        ),
        (
            "debug",
            "autoencoder.loop.best_metric=psnr data.hold_out=0",
            "autoencoder",
            "data.hold_out above 0",
            "data.hold_out=1",
        ),
        (
            "debug",
            "autoencoder.loop.report_to=[tensorboard,wandb]",
            "autoencoder",
            "wandb is not installed",
            "autoencoder.loop.report_to=[tensorboard]",
        ),
        (
            "debug",
            "autoencoder.optimizer.kind=adamw8bit",
            "autoencoder",
            "bitsandbytes",
            "autoencoder.optimizer.kind=adamw",
        ),
        (
            "debug",
            "autoencoder.decoder_alone.l1_weight=1 autoencoder.model.detail_dropout=0",
            "autoencoder",
            "makes none",
            "autoencoder.model.detail_dropout=0.5",
        ),
        ("debug", "data.resolution=50", "autoencoder", "the nearest is 48", "data.resolution=48"),
        ("debug", "data.resolution=50", "diffusion", "the nearest is 48", "data.resolution=48"),
        ("debug", "data.buckets=[[32,30]]", "autoencoder", "in multiples of 8 pixels", "data.buckets=[[32,32]]"),
        ("debug", "data.buckets=[[32,30]]", "diffusion", "in multiples of 8 pixels", "data.buckets=[[32,32]]"),
        (
            "debug-text",
            "diffusion.prompts.max_length=600",
            "diffusion",
            "to 512 or less",
            "diffusion.prompts.max_length=512",
        ),
        (
            "debug-text",
            "base=debug-qwenimage diffusion.prompts.max_length=1025",
            "diffusion",
            "to 1024 or less",
            "diffusion.prompts.max_length=1024",
        ),
        (
            "debug",
            "base=debug-dit diffusion.sample.guidance_interval=[0,0.5]",
            "diffusion",
            r"leave sample.guidance_interval at [0, 1]",
            "diffusion.sample.guidance_interval=[0,1]",
        ),
    ],
)
def test_settings_that_fail_late_are_told_before_the_base(
    recipe: str,
    wrong: str,
    section: Any,
    message: str,
    right: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("davae.recipes.checks._is_installed", lambda name: name == "tensorboard")
    for without_images in (False, True):  # a run, a dry run
        with pytest.raises(DavaeError, match=re.escape(message)):
            check_upgrade(_recipe(wrong.split(), recipe), section, without_images=without_images)
    check_upgrade(_recipe([*wrong.split(), right], recipe), section)


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
@pytest.mark.parametrize("key", ["loop.checkpoints_total_limit", "loop.precision", "optimizer.kind"])
def test_a_key_without_its_section_is_the_trained_stage_s(key: str, stage: str) -> None:
    """As messages of the loop give it, which do not know the section."""
    with pytest.raises(DavaeError, match=rf"; did you mean '{stage}\.{key}'\?$"):
        load_recipe("debug", [f"{key}=1"], stage=stage)


@pytest.mark.parametrize(
    ("name", "absent"), [("lpips", "lpips"), ("dino", None), ("efficientnet", "efficientnet_lite_pytorch")]
)
@pytest.mark.parametrize("installed", [True, False])
def test_networks_of_losses_are_asked_for_before_the_base(
    name: str, absent: str | None, installed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("davae.recipes.checks._is_installed", lambda _: installed)
    wrong = f"autoencoder.reconstruction.{name}_weight=1"
    if installed and name == "efficientnet":
        check_upgrade(_recipe([wrong]), "autoencoder")
        return
    missing = (
        f"{name}_backbone, which is not set" if installed or absent is None else f"{absent}, which is not installed"
    )
    with pytest.raises(DavaeError, match=missing) as refused:
        check_upgrade(_recipe([wrong]), "autoencoder")
    check_upgrade(_recipe([wrong]), "autoencoder", without_images=True)  # a dry run counts without them
    right = _settings(str(refused.value))
    assert f"autoencoder.reconstruction.{name}_weight=0" in right
    check_upgrade(_recipe([wrong, *right]), "autoencoder")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("data.crop=random", "data.cache_latents=false"),
        ("diffusion.tune.frozen_dtype=bfloat16 diffusion.loop.precision=bf16", "tune.mode=lora"),
        ("learning_rate=1", "did you mean"),
        ("autoencoder.start_from=a autoencoder.model.start_from=b", "keep start_from"),
    ],
)
def test_settings_that_do_not_fit_each_other(wrong: str, message: str) -> None:
    with pytest.raises(DavaeError, match=message) as caught:
        load_recipe("debug", wrong.split(), stage="diffusion")
    meant = re.search(r"did you mean '([\w.]+)'\?", str(caught.value))
    followed = {
        "data.crop=random": ["data.crop=center"],
        "learning_rate=1": [f"{meant[1]}=1" if meant else ""],
        "autoencoder.start_from=a autoencoder.model.start_from=b": ["autoencoder.start_from=a"],
    }
    load_recipe("debug", followed.get(wrong, [*wrong.split(), "diffusion.tune.mode=lora"]))


def _photos(folder: Path, kind: str) -> str:
    _images(folder, {"one": 1, "three": 3}.get(kind, 0))
    if kind == "jxl":
        (folder / "a.jxl").write_bytes(b"\xff\x0a")
    if kind == "small":
        Image.new("RGB", (4, 4)).save(folder / "a.png")
    return f"data.path={folder}"


@pytest.mark.parametrize(
    ("kind", "settings", "message", "advice"),
    [
        ("jxl", "", "no image", None),
        ("empty", "", "no image", None),
        ("small", "data.hold_out=0 data.resolution=32", "lower resolution", "data.resolution=16"),
        ("three", "data.hold_out=3", None, None),  # a tenth, at least one
        ("one", "data.hold_out=1", None, None),
        ("one", "data.hold_out=0.05", None, None),
        ("three", "data.hold_out=0", None, None),
    ],
)
def test_images_are_looked_at_before_the_base(
    kind: str, settings: str, message: str | None, advice: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a dry run too; what is advised trains."""
    monkeypatch.chdir(tmp_path)
    overrides = [*SMALL, _photos(tmp_path / "photos", kind), *settings.split()]
    if message is not None:
        with pytest.MonkeyPatch.context() as closed:
            closed.setattr(
                "davae.training.runs.train.load_recipe_autoencoder", lambda *_, **__: pytest.fail("base loaded")
            )
            for dry_run in (True, False):
                with pytest.raises(DavaeError, match=message):
                    run_autoencoder("debug", overrides, dry_run=dry_run)
                with pytest.raises(DavaeError, match=message):
                    check_upgrade(_recipe(overrides), "diffusion", without_images=dry_run)
    if message is None or advice is not None:
        train_autoencoder(_recipe([*overrides, *([advice] if advice else [])]), tmp_path / "run")
        assert (tmp_path / "run" / "autoencoder" / "config.json").is_file()


@pytest.mark.parametrize("recipe", ["debug", "debug-text"])
def test_the_second_stage_trains_without_held_out_images(recipe: str, tmp_path: Path) -> None:
    small = [o for o in SMALL if not o.startswith(("data.resolution", "data.hold_out"))]
    settings = _recipe([*small, "data.path=procedural:3", "data.hold_out=0", "diffusion.loop.steps=1"], recipe)
    stage1 = train_autoencoder(settings, tmp_path / "stage1")
    result = train_diffusion(settings, tmp_path / "stage2", stage1.result)
    assert result.metrics == {}
    assert (result.result / "model_index.json").is_file()


def test_images_without_captions_are_told_before_the_base_and_in_a_dry_run(tmp_path: Path) -> None:
    overrides = [_photos(tmp_path / "photos", "three"), "data.hold_out=1", "data.resolution=64"]
    with pytest.raises(DavaeError, match="none of the 2 images has one: put a text file"):
        run_diffusion("debug-text", overrides, dry_run=True)
    for image in (tmp_path / "photos").glob("*.png"):
        image.with_suffix(".txt").write_text("a picture")
    run_diffusion("debug-text", overrides, dry_run=True)
    run_autoencoder("debug-text", overrides, dry_run=True)


def test_every_way_out_of_full_memory_is_a_setting_that_a_run_goes_on_with() -> None:
    allowed = resumable_keys("upgrade")
    for section in ("autoencoder", "diffusion"):
        for validating in (False, True):
            stage = _Stage(batch_size=8, validation_images=6)
            stage.section = section
            advised = _settings(out_of_memory_message(stage, validating=validating))
            assert len(advised) >= 2
            load_recipe("debug", advised)
            assert {a.partition("=")[0] for a in advised} <= allowed | {"data.cache"}
    assert not re.search(r"data\.cache=", out_of_memory_message(_Stage()))  # stage 1 reads images
    stage.dataset.bucket_of = [0] * 7  # type: ignore[attr-defined]
    assert "batch_size" not in out_of_memory_message(stage)
    stage.can_recompute = False
    assert "gradient_checkpointing" not in out_of_memory_message(stage)


def test_the_way_out_of_bad_steps_is_one_that_a_run_goes_on_with(tmp_path: Path) -> None:
    loop = LoopSettings(steps=2, batch_size=1, precision="bf16", skip_grad_norm=2.0)
    guard = NonFiniteGuard("stage", loop, tmp_path, section="diffusion", skipped=2)
    with pytest.raises(DavaeError, match="nothing was learnt") as caught:
        guard.refuse_if_nothing_was_learnt(0, 2)
    with pytest.raises(DavaeError) as given_up:
        guard.give_up({"image": torch.zeros(1)})
    for message in (str(caught.value), str(given_up.value)):
        keys = set(re.findall(r"diffusion(?:\.\w+)+", message))
        assert {"diffusion.optimizer.learning_rate", "diffusion.loop.max_grad_norm"} < keys <= resumable_keys("upgrade")
        load_recipe("debug", _settings(message))


@pytest.mark.parametrize("name", ["sd3", "flux", "lumina2", "qwenimage"])
def test_the_longest_prompt_is_the_pipelines(name: str) -> None:
    """One more token is what the pipeline itself refuses when it samples."""
    pipe = small_pipeline(name)
    longest = family_of(pipe).longest_text
    assert longest is not None
    family_of(pipe).check_length(longest)
    with pytest.raises(DavaeError, match=f"at most {longest} tokens"):
        family_of(pipe).check_length(longest + 1)
    with pytest.raises(ValueError, match=f"cannot be greater than {longest}"):
        pipe(prompt="a", height=64, width=64, num_inference_steps=1, max_sequence_length=longest + 1)
