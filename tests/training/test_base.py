"""A base pipeline from nothing: two trainings in one folder, which go on wherever the first ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from tests.data.files import picture

from davae.errors import DavaeError
from davae.pipelines import ClassConditionalPipeline
from davae.recipes.read import load_recipe
from davae.recipes.settings import BaseRecipe
from davae.training.base import train as base_module
from davae.training.base.train import train_base

_LOOP = {
    "steps": 1,
    "batch_size": 2,
    "validation_images": 2,
    "precision": "no",
    "log_every": 1,
    "report_to": "[]",
}


def _recipe(*more: str) -> BaseRecipe:
    overrides = [
        f"{half}.loop.{key}={value}" for half in ("autoencoder", "transformer") for key, value in _LOOP.items()
    ]
    overrides += ["data.path=procedural:4", "data.hold_out=2", "data.resolution=32"]
    overrides += ["autoencoder.architecture.block_out_channels=[8,8]"]
    overrides += ["transformer.architecture.hidden_size=16", "transformer.architecture.num_layers=1"]
    overrides += [
        "transformer.architecture.num_attention_heads=1",
        "transformer.sample.num_inference_steps=1",
    ]
    recipe = load_recipe("tiny-base", [*overrides, *more])
    assert isinstance(recipe, BaseRecipe)
    return recipe


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("base")
    train_base(_recipe(), out)
    return out


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """Copies: what is loaded may still lie in the file, which the tests change."""
    return {n: value.clone() for n, value in AutoencoderKL.from_pretrained(folder).state_dict().items()}


@pytest.mark.parametrize("left", ["config alone", "half the weights"])
def test_half_an_exported_autoencoder_is_made_again(finished: Path, left: str) -> None:
    """As an export that was killed left it before folders were written beside and renamed."""
    folder = finished / "autoencoder" / "vae"
    weights, whole = folder / "diffusion_pytorch_model.safetensors", _weights(folder)
    if left == "config alone":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    train_base(_recipe(), finished)
    assert all(torch.equal(value, whole[name]) for name, value in _weights(folder).items())
    ClassConditionalPipeline.from_pretrained(finished / "pipeline")


def test_a_whole_autoencoder_is_not_trained_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("its stage was made")

    monkeypatch.setattr(base_module.BaseAutoencoderStage, "__init__", never)
    train_base(_recipe(), finished)


def test_a_kill_in_the_middle_of_an_export_leaves_no_half_of_it(
    finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class _Killed(BaseException):
        pass

    def killed(self: AutoencoderKL, folder: Path, **_: object) -> None:
        self.save_config(folder)
        raise _Killed

    out = tmp_path / "base"
    with monkeypatch.context() as patched:
        patched.setattr(AutoencoderKL, "save_pretrained", killed)
        with pytest.raises(_Killed):
            train_base(_recipe(), out)
    assert not (out / "autoencoder" / "vae").exists()
    train_base(_recipe(), out)
    whole = _weights(finished / "autoencoder" / "vae")
    assert all(torch.equal(value, whole[name]) for name, value in _weights(out / "autoencoder" / "vae").items())


@pytest.mark.parametrize("change", ["settings", "images"])
def test_a_finished_first_half_of_another_recipe_or_of_other_images_is_not_taken(tmp_path: Path, change: str) -> None:
    photos, out = tmp_path / "photos", tmp_path / "base"
    photos.mkdir()

    def paint(seed: int) -> None:
        for number in range(6):
            picture(seed + number, (40 + seed, 40)).save(photos / f"{number}.png")

    paint(0)
    asked = [f"data.path={photos}"]
    train_base(_recipe(*asked), out)
    shutil.rmtree(out / "transformer")  # as if stopped between the halves
    before = (out / "autoencoder" / "config.yaml").read_bytes()
    if change == "settings":
        asked.append("autoencoder.loop.seed=5")
    else:
        paint(9)
    words = r"autoencoder\.loop\.seed: 0 -> 5" if change == "settings" else "the images: "
    with pytest.raises(DavaeError, match=words):
        train_base(_recipe(*asked), out)
    assert (out / "autoencoder" / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("half", ["autoencoder", "transformer"])
def test_other_settings_of_a_half_are_refused_before_images_are_read(
    finished: Path, half: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first half too when the second one has begun, which would leave it as it is without a word."""
    monkeypatch.setattr(base_module, "open_part", lambda *_, **__: pytest.fail("images opened"))
    with pytest.raises(DavaeError, match=rf"{half} holds a run with other settings .*{half}\.loop\.seed: 0 -> 5"):
        train_base(_recipe(f"{half}.loop.seed=5"), finished)


def test_a_first_half_that_stays_as_it_is_says_so(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = shutil.copytree(finished, tmp_path / "base")
    before = _weights(out / "autoencoder" / "vae")
    train_base(_recipe("autoencoder.loop.steps=3", "transformer.loop.steps=2"), out)
    assert "stays as it is, without autoencoder.loop.steps: 1 -> 3" in caplog.text
    assert all(torch.equal(value, before[name]) for name, value in _weights(out / "autoencoder" / "vae").items())


def test_the_second_half_may_be_another_on_a_first_half_without_checkpoints(finished: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished, tmp_path / "base")
    shutil.rmtree(out / "transformer")
    shutil.rmtree(out / "autoencoder" / "checkpoints")
    before = _weights(out / "autoencoder" / "vae")
    train_base(_recipe("transformer.architecture.hidden_size=32"), out)
    assert all(torch.equal(value, before[name]) for name, value in _weights(out / "autoencoder" / "vae").items())


def test_a_prefix_as_long_as_the_latent_is_refused_before_the_first_half(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match=r"loss\.prefixes\.channels: 8 is no prefix of a latent of 8 channels"):
        train_base(_recipe("transformer.loss.prefixes.channels=[8]"), tmp_path / "base")
    assert not (tmp_path / "base" / "autoencoder").exists()
