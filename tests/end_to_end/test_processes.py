"""Two processes learn what one learns from the same images, and a run may change their number."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.end_to_end import children

from davae.bases.tiny import debug_base
from davae.models import AutoencoderDA
from davae.recipes.read import load_recipe
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.runs.train import train_autoencoder, train_diffusion

STEPS, EVERY = 20, 5


def _overrides(stage: str, batch: int) -> list[str]:
    loop = {
        "steps": STEPS,
        "batch_size": batch,
        "gradient_accumulation": 2,
        "log_every": 1,
        "checkpoint_every": EVERY,
        "checkpoints_total_limit": 9,
        "validate_every": 0,
    }
    return [
        *(f"{stage}.loop.{k}={v}" for k, v in loop.items()),
        # Adam turns roundings of small gradients into whole steps; small steps keep them small.
        f"{stage}.optimizer.learning_rate=1e-4",
        # Both are made from the gradients of one process's images.
        "autoencoder.alignment.adaptive=false",
        "autoencoder.reconstruction.gan.weight=0",
        "diffusion.tune.new_channels_learning_rate=null",
    ]


def _on_two(stage: str, out, extra: list[str], batch: int = 2) -> None:
    words = [
        "davae",
        "train",
        stage,
        "--recipe",
        "debug",
        "--out",
        str(out),
        *extra,
        *_overrides(stage, batch),
    ]
    children.together(children.davae, words, log=out.with_suffix(".log"))


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    out = tmp_path_factory.mktemp("first")
    AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8).save_pretrained(out)
    return out


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_two_processes_follow_one_and_a_run_goes_from_one_to_two_and_back(stage, autoencoder, tmp_path):
    recipe = load_recipe("debug", _overrides(stage, 4))
    extra = ["--autoencoder", str(autoencoder)] if stage == "diffusion" else []

    def on_one(out):
        torch.set_num_threads(1)
        if stage == "autoencoder":
            train_autoencoder(recipe, out)
        else:
            train_diffusion(recipe, out, autoencoder)

    one, two = tmp_path / "one", tmp_path / "two"
    on_one(one)
    _on_two(stage, two, extra)
    _require_same(one, two)

    one_to_two, two_to_one = tmp_path / "one_to_two", tmp_path / "two_to_one"
    for source, copy in ((one, one_to_two), (two, two_to_one)):
        shutil.copytree(source, copy)
        for step in (STEPS - EVERY, STEPS):
            shutil.rmtree(copy / "checkpoints" / f"step-{step}")
    _on_two(stage, one_to_two, extra)
    on_one(two_to_one)
    _require_same(one, one_to_two)
    _require_same(one, two_to_one)


def _require_same(one, other) -> None:
    first, second = (read_metrics(out / "metrics.jsonl") for out in (one, other))
    assert len(first) == len(second) == STEPS + 1  # and the validation
    for a, b in zip(first, second):
        if "total" in a:
            assert b["total"] == pytest.approx(a["total"], rel=1e-5), f"step {a['step']}"
    weights = [load_file(out / "checkpoints" / f"step-{STEPS}" / "model.safetensors") for out in (one, other)]
    first_all, second_all = (torch.cat([v.flatten().float() for v in w.values()]) for w in weights)
    assert weights[0].keys() == weights[1].keys()
    assert (first_all - second_all).abs().max() < 1e-4
    assert (first_all - second_all).norm() / first_all.norm() < 1e-4
