"""AdamW with 8-bit moments: it learns, its checkpoints hold all of it, and bad steps are left out."""

import importlib.util
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from davae.errors import DavaeError
from davae.recipes.loop import OptimizerSettings
from davae.recipes.read import load_recipe
from davae.training.engine.optimizer import make_optimizer
from davae.training.engine.tensors import optimizer_tensors
from davae.training.runs.train import train_autoencoder

SETTINGS = OptimizerSettings(kind="adamw8bit", learning_rate=1e-2, weight_decay=0.1)
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def _module():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(16, 64, 3), nn.Conv2d(64, 4, 1)).to(memory_format=torch.channels_last)


def _steps(module, optimizer, numbers):
    for number in numbers:
        x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(number))
        (module(x) - x[:, :4, 1:-1, 1:-1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def _weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_without_bitsandbytes_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(DavaeError, match=r"pip install bitsandbytes.*optimizer.kind=adamw"):
        make_optimizer("model", _module(), SETTINGS, {})


@needs_bitsandbytes
def test_moments_are_bytes_and_steps_are_near_those_of_adamw():
    small, whole = _module(), _module()
    ours = make_optimizer("model", small, SETTINGS, {})
    theirs = make_optimizer("model", whole, SETTINGS.model_copy(update={"kind": "adamw"}), {})
    before = _weights(small)
    _steps(small, ours, range(8))
    _steps(whole, theirs, range(8))
    moved = _weights(whole) - before
    assert (_weights(small) - _weights(whole)).norm() < 0.1 * moved.norm()
    state = optimizer_tensors(ours)
    assert state["0.state1"].dtype == state["0.state2"].dtype == torch.uint8
    assert state["2.state1"].dtype == torch.float32  # small tensors keep all digits


@needs_bitsandbytes
def test_a_run_that_goes_on_ends_with_the_same_weights(tmp_path):
    options = [
        "optimizer.kind=adamw8bit",
        "loop.steps=4",
        "loop.checkpoint_every=2",
        "reconstruction.gan.weight=0",
    ]
    recipe = load_recipe("debug", [f"autoencoder.{o}" for o in options])
    whole = train_autoencoder(recipe, tmp_path / "whole")
    train_autoencoder(recipe, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-4")
    train_autoencoder(recipe, tmp_path / "parts")
    found = [load_file(tmp_path / n / "checkpoints" / "step-4" / "model.safetensors") for n in ("whole", "parts")]
    assert whole.steps == 4
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
