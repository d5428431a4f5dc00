"""The scale of fp16 losses, on the CPU: a power of two changes no bit, so that runs with and without it are equal."""

import json

import pytest
import torch
from tests.training.test_loop import _Objective, _Stage, _weights
from torch.amp import GradScaler

from davae.recipes.loop import OptimizerSettings
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.engine.fsdp import begin_accelerator
from davae.training.loop import loop
from davae.training.loop.loop import train
from davae.training.stage import TrainedModule

MOST = 20.0  # gradient norm that some steps of the toy exceed


@pytest.fixture
def scaled(monkeypatch):
    """Trainings from here on scale their losses as fp16 does, beginning at 2^10."""

    def begin(**options):
        accelerator = begin_accelerator(**{**options, "mixed_precision": "no"})
        accelerator.scaler = scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        accelerator.unscale_gradients = lambda optimizer: scaler.unscale_(optimizer.optimizer)
        return accelerator

    monkeypatch.setattr(loop, "begin_accelerator", begin)


class _TwoPlayers(_Stage):
    def __init__(self, **settings):
        super().__init__(max_grad_norm=1.0, **settings)
        torch.manual_seed(1)
        self.modules += [TrainedModule("other", _Objective(), OptimizerSettings(learning_rate=0.02))]

    def weights(self):
        return torch.cat([_weights(self), *[p.detach().flatten() for p in self.modules[1].module.parameters()]])


def _scales(run):
    return [json.loads((c / "state.json").read_text())["scaler"]["scale"] for c in checkpoints(run / "checkpoints")]


def test_a_scaled_training_is_the_unscaled_one_also_for_a_second_player(tmp_path, scaled, monkeypatch):
    made = _TwoPlayers(precision="fp16")
    train(made, tmp_path / "scaled", {})
    assert _scales(tmp_path / "scaled") == [2.0**11, 2.0**12]  # after 4 and 8 steps: it grew at 3 and 6
    monkeypatch.undo()
    plain = _TwoPlayers()
    train(plain, tmp_path / "plain", {})
    assert torch.equal(made.weights(), plain.weights())


def test_a_stop_keeps_the_scale(tmp_path, scaled):
    train(_TwoPlayers(precision="fp16"), tmp_path / "whole", {})
    train(_TwoPlayers(precision="fp16"), tmp_path / "parts", {}, stop_after=4)
    train(_TwoPlayers(precision="fp16"), tmp_path / "parts", {})
    assert _scales(tmp_path / "whole") == _scales(tmp_path / "parts")


def test_what_is_told_as_skipped_is_skipped(tmp_path, scaled):
    """The scaler looks at gradients only, and knows no limit of their norm."""
    stage = _Stage(steps=6, precision="fp16", skip_grad_norm=MOST, checkpoint_every=1)
    stage.loop = stage.loop.model_copy(update={"checkpoints_total_limit": 9})
    train(stage, tmp_path, {})
    message = {json.loads(line)["step"] for line in (tmp_path / "skipped_steps.jsonl").read_text().splitlines()}
    assert 0 < len(message) < 6
    from safetensors.torch import load_file

    after = [load_file(c / "model.safetensors")["layer.weight"] for c in checkpoints(tmp_path / "checkpoints")]
    for step in range(2, 7):
        assert torch.equal(after[step - 1], after[step - 2]) == (step in message)


def test_overflows_are_the_search_for_a_scale(tmp_path, scaled):
    """Twelve in a row are more than the ten bad steps that end a run."""
    stage = _Stage(steps=14, precision="fp16")
    stage.objective.register_forward_hook(
        lambda module, inputs, losses: {"total": losses["total"] * (1e38 if inputs[1] < 12 else 1.0)}
    )
    train(stage, tmp_path, {})
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["weight"] == pytest.approx(float(_weights(stage)[:3].sum()))
    assert len((tmp_path / "skipped_steps.jsonl").read_text().splitlines()) == 12
