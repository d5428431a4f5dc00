"""A base pipeline from nothing: two trainings in one folder, which go on wherever the first ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from tests.data.files import picture

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.latent_space import encode, to_model_space
from davae.pipelines import ClassConditionalPipeline
from davae.recipes.read import load_recipe
from davae.recipes.settings import BaseRecipe
from davae.runtime.resizing import reduced
from davae.training.base import train as base_module
from davae.training.base.train import dry_run_base, train_base
from davae.training.data import open_part

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
    overrides += ["autoencoder.reconstruction.efficientnet_weight=0"]  # whose features need 32 px
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
    with pytest.raises(DavaeError, match=r"loss\.prefixes\.channels: 12 is no prefix of a latent of 12 channels"):
        train_base(_recipe("transformer.loss.prefixes.channels=[12]"), tmp_path / "base")
    assert not (tmp_path / "base" / "autoencoder").exists()


# ------------------------------------------------------------------ on a pretrained autoencoder


@pytest.fixture(scope="module")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``AutoencoderTiny`` of f4 whose configuration states no scaling, as TAESD's."""
    torch.manual_seed(0)
    channels = (8, 8, 8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("taesd")
    vae.save_pretrained(folder)
    return folder


def _pretrained(folder: Path, *more: str) -> BaseRecipe:
    plain = ("autoencoder=null", "full_resolution_crops=0", "save_dtype=float32")
    return _recipe(*plain, f"pretrained_autoencoder={folder}", *more)


@pytest.fixture(scope="module")
def on_pretrained(tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrained")
    train_base(_pretrained(tiny_vae), out)
    return out


def test_a_pretrained_autoencoder_is_kept_and_its_latents_are_normalised(tiny_vae: Path, on_pretrained: Path) -> None:
    pipe, given = ClassConditionalPipeline.from_pretrained(on_pretrained / "pipeline"), _weights_of(tiny_vae)
    assert all(torch.equal(value, given[name]) for name, value in pipe.vae.state_dict().items())
    data = open_part(_pretrained(tiny_vae).data, "train")
    images = torch.stack([reduced(data[i]["image"][None], factor=2)[0] for i in range(len(data))])
    latents = to_model_space(pipe.vae, encode(pipe.vae, images))
    assert float(latents.mean()) == pytest.approx(0, abs=1e-4)
    assert float(latents.std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert pipe.transformer.config.sample_size == 16 // 4
    assert not (on_pretrained / "autoencoder" / "checkpoints").exists()


def _weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return AutoencoderTiny.from_pretrained(folder).state_dict()


def test_a_run_on_a_pretrained_autoencoder_goes_on_without_measuring_again(
    tiny_vae: Path, on_pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(on_pretrained, tmp_path / "base")
    moved = shutil.copytree(tiny_vae, tmp_path / "moved")
    monkeypatch.setattr(base_module, "measure_latents", lambda *_, **__: pytest.fail("measured again"))
    assert train_base(_pretrained(moved, "transformer.loop.steps=2"), out).steps == 2
    other = AutoencoderTiny.from_pretrained(tiny_vae)
    next(iter(other.parameters())).data.add_(1e-3)
    other.save_pretrained(moved)
    with pytest.raises(DavaeError, match="the pretrained autoencoder: other weights"):
        train_base(_pretrained(moved, "transformer.loop.steps=3"), out)


def test_a_scaling_that_an_autoencoder_states_is_kept(tiny_vae: Path, tmp_path: Path) -> None:
    stated = AutoencoderTiny.from_pretrained(tiny_vae)
    stated.register_to_config(scaling_factor=0.5)
    stated.save_pretrained(tmp_path / "stated")
    train_base(_pretrained(tmp_path / "stated"), tmp_path / "base")
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path / "base" / "pipeline")
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor) == (0.5, 0.0)


def test_a_pretrained_autoencoder_that_does_not_fit_is_refused(tiny_vae: Path, tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match="leave one of them out"):
        _recipe(f"pretrained_autoencoder={tiny_vae}")
    with pytest.raises(DavaeError, match="full_resolution_crops"):
        _recipe("autoencoder=null", f"pretrained_autoencoder={tiny_vae}")
    with pytest.raises(DavaeError, match=r"18 pixels are not a multiple of 4 .* the nearest is 16"):
        train_base(_pretrained(tiny_vae, "data.resolution=36"), tmp_path / "a")
    upgraded = AutoencoderDA.from_base(AutoencoderTiny.from_pretrained(tiny_vae), scale=2, detail_channels=4)
    upgraded.save_pretrained(tmp_path / "upgraded")
    with pytest.raises(DavaeError, match=r"is a AutoencoderDA .*: a class-conditional pipeline decodes with"):
        train_base(_pretrained(tmp_path / "upgraded"), tmp_path / "b")
    assert "autoencoder (f4) of" in dry_run_base(_pretrained(tiny_vae))
