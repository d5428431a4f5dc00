"""What a run stands on is known by what it holds: other weights or images are refused, moved ones and more are not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from davae.bases.open import load_base
from davae.bases.tiny import debug_base
from davae.data import open_dataset
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.recipes.read import load_recipe
from davae.recipes.settings import UpgradeRecipe
from davae.training.checkpoints.checkpoint import checkpoints, plain_values
from davae.training.checkpoints.run_directory import RunDirectory
from davae.training.diffusion.tuning import started_from
from davae.training.loop.loop import TrainResult
from davae.training.runs.train import cache_folder, train_autoencoder, train_diffusion
from davae.warm_start import channel_parameters

SMALL = [
    "data.resolution=32",
    "data.hold_out=2",
    "data.cache_latents=false",
    "autoencoder.statistics_images=4",
    "autoencoder.alignment.adaptive=false",
    "autoencoder.reconstruction.gan.weight=0",
    *(f"{stage}.loop.{o}" for stage in ("autoencoder", "diffusion") for o in ("steps=2", "validation_images=1")),
    *(f"{stage}.loop.{o}" for stage in ("autoencoder", "diffusion") for o in ("batch_size=2", "checkpoint_every=1")),
    "autoencoder.loop.gradient_accumulation=1",
    "diffusion.sample.num_inference_steps=1",
    "diffusion.tune.lora.rank=2",
]


def _images(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    for number in range(first, first + count):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    return folder


def _recipe(*overrides: str) -> UpgradeRecipe:
    recipe = load_recipe("debug", [*SMALL, *overrides])
    assert isinstance(recipe, UpgradeRecipe)
    return recipe


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's folder, images, and both stages trained."""
    here = tmp_path_factory.mktemp("made")
    debug_base().save_pretrained(here / "base")
    _images(here / "photos", 6)
    recipe = _recipe(f"base={here / 'base'}", f"data.path={here / 'photos'}")
    stage1 = train_autoencoder(recipe, here / "stage1")
    train_diffusion(recipe, here / "stage2", stage1.result)
    return here


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy, at another place, as the working directory."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def _stage1(*overrides: str) -> TrainResult:
    return train_autoencoder(_recipe("base=base", "data.path=photos", *overrides), Path("stage1"))


def _stage2(*overrides: str, out: str = "stage2") -> TrainResult:
    return train_diffusion(
        _recipe("base=base", "data.path=photos", *overrides), Path(out), Path("stage1") / "autoencoder"
    )


def _change(file: Path) -> None:
    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if t.is_floating_point() and not n.startswith("base"))
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_everything_may_move(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Base, autoencoder, images and runs lie elsewhere; nothing is trained again, and the other stage's section is its
    own affair.
    """
    before = {run: checkpoints(Path(run) / "checkpoints") for run in ("stage1", "stage2")}
    with caplog.at_level("INFO", logger="davae"):
        _stage1("diffusion.loss.detail_warmup_steps=77", "diffusion.tune.mode=lora")
        _stage2("autoencoder.alignment.weight=7")
    assert "data.path" in caplog.text
    assert "autoencoder_folder" in caplog.text
    assert {run: checkpoints(Path(run) / "checkpoints") for run in before} == before


@pytest.mark.parametrize(
    ("file", "what"),
    [
        ("base/transformer/diffusion_pytorch_model.safetensors", "the base's transformer: other weights"),
        ("stage1/autoencoder/diffusion_pytorch_model.safetensors", "the autoencoder: other weights"),
    ],
)
def test_other_weights_at_the_same_path_are_refused(file: str, what: str, place: Path) -> None:
    _change(Path(file))
    with pytest.raises(DavaeError, match=f"what it stands on is not what it began with .*{what}.*another --out"):
        _stage2()
    _stage2(out="another")  # the advice


def test_another_base_autoencoder_is_refused_in_stage_1(place: Path) -> None:
    _change(Path("base/vae/diffusion_pytorch_model.safetensors"))
    with pytest.raises(DavaeError, match="the base autoencoder: other weights"):
        _stage1()


def test_statistics_of_the_details_count_as_weights(place: Path) -> None:
    """They scale what the transformer sees, and stand in the configuration."""
    vae = AutoencoderDA.from_pretrained("stage1/autoencoder")
    mean, std = vae.detail_statistics()
    vae.set_detail_statistics(mean, 2 * std)
    vae.save_pretrained("stage1/autoencoder")
    with pytest.raises(DavaeError, match="the autoencoder: other weights"):
        _stage2()


def test_training_stage_1_further_is_not_continuing_stage_2_on_it(place: Path) -> None:
    _stage1("autoencoder.loop.steps=3")
    with pytest.raises(DavaeError, match="the autoencoder: other weights"):
        _stage2("diffusion.loop.steps=3")


def test_a_level_that_another_stands_on_stays_as_it_is(place: Path) -> None:
    """More steps are the last level's; a lower level that became another is refused."""
    nested = ["autoencoder.model.scale=4", "autoencoder.model.detail_channels=[8,8]", "data.resolution=64"]
    train_autoencoder(_recipe("data.path=photos", *nested), Path("nested"))
    train_autoencoder(_recipe("data.path=photos", *nested, "autoencoder.loop.steps=3"), Path("nested"))
    assert [len(checkpoints(Path(f) / "checkpoints")) for f in ("nested", "nested/level-1")] == [2, 2]
    assert not Path("nested/level-1/checkpoints/step-3").exists()
    _change(Path("nested/level-1/autoencoder/diffusion_pytorch_model.safetensors"))
    with pytest.raises(DavaeError, match="the levels below: other weights"):
        train_autoencoder(_recipe("data.path=photos", *nested, "autoencoder.loop.steps=3"), Path("nested"))


def test_images_replaced_or_gone_are_refused_and_named(place: Path) -> None:
    used = open_dataset("photos", resolution=32, hold_out=2)
    name = used.id(0)
    kept = (place / "photos" / name).read_bytes()
    Image.new("RGB", (50, 50), "red").save(place / "photos" / name)
    with pytest.raises(DavaeError, match=f"the images: {name} of another size under the same name"):
        _stage1()
    (place / "photos" / name).unlink()
    with pytest.raises(DavaeError, match="the images: 1 of 4 are gone"):
        _stage1()
    (place / "photos" / name).write_bytes(kept)  # "put that back"
    _stage1()


def test_more_images_are_learnt_from_and_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    _images(place / "photos", 4, first=50)
    with caplog.at_level("INFO", logger="davae"):
        _stage1("autoencoder.loop.steps=4")
    assert "more images, such as 5" in caplog.text
    state = plain_values(checkpoints(Path("stage1/checkpoints"))[-1])
    assert state["stream"]["length"] == len(open_dataset("photos", resolution=32, hold_out=2))


def test_a_checkpoint_that_knows_nothing_refuses_other_places(place: Path) -> None:
    """Of an earlier version: only names can be compared, and they are."""
    for checkpoint in checkpoints(Path("stage2/checkpoints")):
        state = json.loads((checkpoint / "state.json").read_text())
        del state["stands_on"]
        (checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(DavaeError, match=r"other settings .*data\.path"):
        _stage2()


def test_settings_that_change_nothing_learnt_may_change(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    more = [
        "steps=4",
        "max_grad_norm=0.5",
        "skip_grad_norm=1e9",
        "validate_every=1",
        "validation_images=2",
        "best_metric=held_out_total",
        "channels_last=false",
        "log_every=2",
    ]
    with caplog.at_level("INFO", logger="davae"):
        result = _stage2(
            *(f"diffusion.loop.{o}" for o in more),
            "diffusion.optimizer.learning_rate=2e-3",  # that of the widened layers: the groups become one
            "diffusion.optimizer.lr_scheduler=cosine",
            "diffusion.sample.guidance_scale=1",
            "description=other",
        )
    assert result.steps == 4
    assert (Path("stage2/checkpoints/step-4")).is_dir()
    assert "diffusion.loop.steps: 2 -> 4" in caplog.text


OPENERS = ("runs.train.load_recipe_autoencoder", "diffusion.train.load_recipe_base")
"""What opens a base, in stage 1 and stage 2."""


@contextmanager
def _nothing_opens() -> Iterator[None]:
    """Neither images nor a base."""
    with pytest.MonkeyPatch.context() as closed:
        for name in ("runs.train.check_images", *OPENERS):
            closed.setattr(f"davae.training.{name}", lambda *_, **__: pytest.fail("opened"))
        yield


@pytest.mark.parametrize(
    ("setting", "fits"),
    [
        ("diffusion.loop.seed=1", True),
        ("data.crop=random", True),
        ("diffusion.tune.mode=lora", False),
        ("autoencoder.loop.ema_decay=0.5", True),
        ("autoencoder.reconstruction.gan.weight=1", True),
        ("autoencoder.model.detail_channels=16", False),
        ("autoencoder.model.scale=4", False),
    ],
)
def test_settings_of_what_is_learnt_may_not_and_the_advice_works(setting: str, fits: bool, place: Path) -> None:
    """Told before images or weights are opened; ``start_from`` is advised where the weights fit."""
    section = setting.partition(".")[0].replace("data", "diffusion")
    run = {"autoencoder": "stage1", "diffusion": "stage2"}[section]
    again = _stage1 if run == "stage1" else _stage2
    key, _, value = setting.partition("=")
    with _nothing_opens(), pytest.raises(DavaeError, match=f"{re.escape(key)}: .* -> {value}") as refused:
        again(setting)
    message = str(refused.value)
    assert "remove" not in message
    advice = f"{section}.start_from={run}"
    assert (advice in message) == fits
    recipe = _recipe("base=base", "data.path=photos", setting, *([advice] if fits else []))
    if run == "stage1":
        train_autoencoder(recipe, Path("another"))
    else:
        train_diffusion(recipe, Path("another"), Path("stage1") / "autoencoder")


def test_a_level_below_is_compared_before_anything_is_opened(place: Path) -> None:
    """Where the run was stopped before its last level began."""
    nested = ["autoencoder.model.scale=4", "autoencoder.model.detail_channels=[8,8]", "data.resolution=64"]
    RunDirectory(
        Path("nested/level-1"), _recipe("data.path=photos", *nested).model_dump(mode="json") | {"level": 1}
    ).begin()
    refused = pytest.raises(DavaeError, match=r"nested/level-1 holds a run with other settings .*loop\.seed: 0 -> 5")
    with _nothing_opens(), refused:
        train_autoencoder(_recipe("data.path=photos", *nested, "autoencoder.loop.seed=5"), Path("nested"))


def test_fewer_steps_than_were_made_are_refused(place: Path) -> None:
    """The result would be called one of fewer steps. The run's settings stay as they are."""
    before = Path("stage2/config.yaml").read_text()
    with pytest.raises(DavaeError, match=r"has made 2 steps already.*set diffusion\.loop\.steps=2 or higher"):
        _stage2("diffusion.loop.steps=1")
    assert Path("stage2/config.yaml").read_text() == before
    assert _stage2("diffusion.loop.steps=2").steps == 2


def test_moments_follow_their_weights_when_groups_change(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one learning rate for all there is one group: the order in which weights are counted is another."""
    own, one = "diffusion.tune.new_channels_learning_rate", "diffusion.optimizer.learning_rate"
    seen: dict[str, torch.Tensor] = {}

    def look(self: Any, start: int, stop_after: int | None) -> bool:
        trainer = self.trainers[0]
        named = dict(trainer.trained.module.named_parameters())
        seen.update({n: trainer.optimizer.state[p]["exp_avg"] for n, p in named.items()})
        return True

    monkeypatch.setattr("davae.training.loop.loop._Training._steps", look)
    _stage2(f"{own}=1e-3", f"{one}=1e-3")
    saved = load_file(checkpoints(Path("stage2/checkpoints"))[-1] / "model_optimizer.safetensors")
    order = plain_values(checkpoints(Path("stage2/checkpoints"))[-1])["trained"]["model"]
    assert set(order) == set(seen)
    assert order != list(seen), "the groups were in another order"
    for number, name in enumerate(order):
        assert torch.equal(seen[name].contiguous(), saved[f"{number}.exp_avg"]), name


# ---------------------------------------------------------------------- another run from these weights


def test_stage_1_starts_from_an_earlier_run(place: Path) -> None:
    earlier = AutoencoderDA.from_pretrained("stage1/autoencoder").state_dict()
    slow = ("autoencoder.optimizer.learning_rate=1e-12", "autoencoder.loop.ema_decay=null")
    for start in ("stage1", "stage1/autoencoder"):
        out = Path(f"from-{start.replace('/', '-')}")
        recipe = _recipe("base=base", "data.path=photos", f"autoencoder.start_from={start}", *slow)
        train_autoencoder(recipe, out)
        made = AutoencoderDA.from_pretrained(out / "autoencoder").state_dict()
        assert all(torch.allclose(made[n], v, atol=1e-6) for n, v in earlier.items())


def _slow(mode: str) -> list[str]:
    rates = ("diffusion.optimizer.learning_rate=1e-12", "diffusion.tune.new_channels_learning_rate=1e-12")
    return [*rates, f"diffusion.tune.mode={mode}", "diffusion.loop.ema_decay=null"]


def _transformer(run: str) -> dict[str, torch.Tensor]:
    return load_file(Path(run) / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_stage_2_starts_from_a_pipeline_or_a_run(place: Path) -> None:
    for start in ("stage2", "stage2/pipeline"):
        out = f"from-{start.replace('/', '-')}"
        _stage2(f"diffusion.start_from={start}", *_slow("full"), out=out)
        assert all(torch.allclose(v, _transformer(out)[n], atol=1e-6) for n, v in _transformer("stage2").items())
    shutil.move("stage2", "gone")
    _stage2("diffusion.start_from=stage2", *_slow("full"), "diffusion.loop.steps=3", out="from-stage2")  # goes on


def test_what_a_tuning_starts_from_leaves_the_base_as_it_is(place: Path) -> None:
    """The widened transformer shares the base's weights: samples of the base, to compare with, must stay the base's."""
    base, vae = load_base("base"), AutoencoderDA.from_pretrained("stage1/autoencoder")
    weights = {name: weight.clone() for name, weight in base.transformer.state_dict().items()}
    found = started_from("stage2", upgrade_pipeline(base, vae, copy=False), base, "full").transformer.state_dict()
    assert all(torch.equal(weight, base.transformer.state_dict()[name]) for name, weight in weights.items())
    assert all(torch.equal(weight, found[name]) for name, weight in _transformer("stage2").items())


def test_stage_2_starts_from_adapters(place: Path) -> None:
    tuned = ["diffusion.tune.mode=lora", "diffusion.optimizer.learning_rate=1e-2", "diffusion.loop.ema_decay=null"]
    _stage2(*tuned, out="lora")
    expected = _transformer("lora")
    for mode, start in (("lora", "lora"), ("lora", "lora/adapters"), ("full", "lora"), ("full", "lora/adapters")):
        out = f"{mode}-{start.replace('/', '-')}"
        _stage2(f"diffusion.start_from={start}", *_slow(mode), out=out)
        found = _transformer(out)
        assert all(torch.allclose(v, found[n], atol=1e-5) for n, v in expected.items()), out
        assert (Path(out) / "adapters").is_dir() == (mode == "lora")
    with pytest.raises(DavaeError, match=r"has rank 2, and the recipe says 4: set diffusion\.tune\.lora\.rank=2"):
        _stage2("diffusion.start_from=lora", *_slow("lora"), "diffusion.tune.lora.rank=4", out="other")
    with pytest.raises(DavaeError, match=r"set diffusion\.tune\.mode=lora"):
        _stage2("diffusion.start_from=lora", *_slow("new_channels"), out="other")
    with pytest.raises(DavaeError, match=r"no adapters in stage2.*diffusion\.tune\.mode=full"):
        _stage2("diffusion.start_from=stage2", *_slow("lora"), out="other")
    widened = channel_parameters(debug_base().transformer)
    assert any(name in expected for name in widened)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ("nowhere", "diffusion.start_from: there is no folder nowhere"),
        ("stage1/nowhere", "diffusion.start_from: there is no folder stage1/nowhere"),
        ("photos", "diffusion.start_from: there is no result of this stage in photos"),
        ("stage1", "diffusion.start_from: there is no result of this stage in stage1"),
        ("stage2", "autoencoder.start_from: there is no result of this stage in stage2"),
        ("unfinished", "diffusion.start_from: there is no result of this stage in unfinished; give a finished run"),
        ("unfinished", "autoencoder.start_from: there is no result of this stage in unfinished; give a finished run"),
        ("stage1/autoencoder/config.json", "autoencoder.start_from: there is no result"),
    ],
)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_a_start_that_is_none_is_told(
    start: str, message: str, mode: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the base is loaded."""
    for run in ("stage1", "stage2"):
        shutil.copytree(f"{run}/checkpoints", f"unfinished/{run}/checkpoints")
    section = message.partition(".")[0]
    recipe = _recipe(f"{section}.start_from={start}", f"diffusion.tune.mode={mode}")
    train = train_autoencoder if section == "autoencoder" else partial(train_diffusion, autoencoder=Path("stage1"))
    for name in OPENERS:
        monkeypatch.setattr(f"davae.training.{name}", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(DavaeError, match=re.escape(message)):
        train(recipe, Path("other"))


def test_a_start_of_another_base_names_its_setting(place: Path) -> None:
    with pytest.raises(DavaeError, match=r"^autoencoder\.start_from: the autoencoder's base has other layers"):
        train_autoencoder(_recipe("base=tiny", "autoencoder.start_from=stage1"), Path("other"))


def test_a_start_may_lie_in_the_home_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave the tilde of ``key=~/folder`` as it is; a cache too is no folder of that name."""
    monkeypatch.setenv("HOME", str(place))
    _stage2("diffusion.start_from=~/stage2", out="other")
    train_autoencoder(
        _recipe("base=base", "data.path=photos", "autoencoder.start_from=~/stage1/autoencoder"), Path("o")
    )
    assert cache_folder(_recipe("data.cache=~/cache"), "debug") == place / "cache"


def test_a_transformer_of_another_width_is_told(place: Path) -> None:
    wide = "autoencoder.model.detail_channels=16"
    train_autoencoder(_recipe("base=base", "data.path=photos", wide), Path("wide"))
    recipe = _recipe("base=base", "data.path=photos", wide, "diffusion.start_from=stage2")
    with pytest.raises(DavaeError, match=r"is not the one that is tuned here: .* tensors differ"):
        train_diffusion(recipe, Path("other"), Path("wide/autoencoder"))
