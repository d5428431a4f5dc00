"""The loop on a stage small enough to follow: stopping, continuing, averaging, schedules, guards."""

import json

import pytest
import torch
from torch import nn

from davae.errors import DavaeError
from davae.training.loop import Player, Stage, learning_rate, train
from davae.training.run_directory import read_metrics
from davae.training.settings import LoopSettings, OptimizerSettings


class _Numbers(torch.utils.data.Dataset):
    classes = ("a",)

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"image": torch.full((3,), float(index)), "label": 0, "caption": "", "id": str(index)}


class _Objective(nn.Module):
    """Linear regression of a noisy target: its loss depends on the data's order and on the step's noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 1)
        self.seen = []

    def forward(self, batch, step):
        self.seen += batch["id"]
        noise = torch.randn(len(batch["image"]), 1)
        loss = (self.layer(batch["image"]) - noise).square().mean()
        return {"total": loss * (float("nan") if step == getattr(self, "bad_step", None) else 1.0)}


class _Stage(Stage):
    name = "toy"

    def __init__(self, **loop):
        defaults = {"steps": 8, "batch_size": 2, "log_every": 1, "checkpoint_every": 4, "report_to": []}
        self.loop = LoopSettings(**{**defaults, **loop})
        self.dataset = _Numbers()
        self.objective = _Objective()
        self.players = [Player("model", self.objective, OptimizerSettings(learning_rate=0.01))]

    def validate(self, samples, step):
        return {"weight": float(self.objective.layer.weight.sum())}

    def export(self, out):
        torch.save({}, out / "unused")
        return out


def _weights(stage):
    return torch.cat([p.detach().flatten() for p in stage.objective.parameters()])


@pytest.mark.parametrize("stops", [[4], [3], [1, 2, 5]])
def test_a_run_that_stops_ends_like_one_that_does_not(tmp_path, stops):
    whole = _Stage(ema_decay=0.9, gradient_accumulation=2)
    train(whole, tmp_path / "whole", {})
    for stop in stops:
        assert (
            train(_Stage(ema_decay=0.9, gradient_accumulation=2), tmp_path / "parts", {}, stop_after=stop)
            is None
        )
    last = _Stage(ema_decay=0.9, gradient_accumulation=2)
    train(last, tmp_path / "parts", {})
    assert torch.equal(_weights(whole), _weights(last))
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(
        tmp_path / "parts" / "metrics.jsonl"
    )


def test_modules_that_come_in_eval_mode_are_trained_in_train_mode(tmp_path):
    stage = _Stage(steps=1)
    stage.objective.eval()
    stage.objective.register_forward_pre_hook(lambda module, _: modes.append(module.layer.training))
    modes = []
    train(stage, tmp_path, {})
    assert modes == [True]


def test_every_image_once_an_epoch(tmp_path):
    stage = _Stage(steps=7)
    train(stage, tmp_path, {})
    assert (
        sorted(stage.objective.seen[:7]) == sorted(stage.objective.seen[7:14]) == [str(i) for i in range(7)]
    )


def test_accumulated_micro_steps_equal_one_gradient(tmp_path):
    """Two micro-batches are averaged, not added."""
    stage = _Stage(steps=1, gradient_accumulation=2, max_grad_norm=1e9)
    train(stage, tmp_path, {})
    logged = read_metrics(tmp_path / "metrics.jsonl")[0]
    fresh = _Objective()
    from davae.data import BatchStream
    from davae.training.loop import _seed_step

    stream = iter(BatchStream(_Numbers(), 2, seed=0))
    total = 0.0
    for micro in range(2):
        batch = next(stream)
        _seed_step(0, 0, micro, 0)
        total = total + fresh(batch, 0)["total"] / 2
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in fresh.parameters()]).norm()
    assert logged["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert logged["total"] == pytest.approx(float(total), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_term(tmp_path):
    stage = _Stage()
    stage.objective.bad_step = 5
    with pytest.raises(DavaeError, match="toy: 'total' is not finite at step 6"):
        train(stage, tmp_path, {})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-4"]


def test_another_recipe_in_the_same_directory_is_refused(tmp_path):
    train(_Stage(), tmp_path, {"loop": {"steps": 8}}, stop_after=2)
    with pytest.raises(DavaeError, match=r"loop\.steps: 8 -> 9"):
        train(_Stage(steps=9), tmp_path, {"loop": {"steps": 9}})


def test_a_finished_run_called_again_only_reports(tmp_path):
    first = _Stage()
    train(first, tmp_path, {})
    again = _Stage()
    result = train(again, tmp_path, {})
    assert again.objective.seen == []
    assert torch.equal(_weights(first), _weights(again))
    assert result.metrics == {"weight": pytest.approx(float(first.objective.layer.weight.sum()))}


def test_a_metrics_line_cut_by_a_kill_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps({"step": 1, "total": 2.0}) + '\n{"step": 2, "tot')
    assert read_metrics(file) == [{"step": 1, "total": 2.0}]


def test_learning_rate_by_hand():
    cosine = OptimizerSettings(learning_rate=1.0, lr_scheduler="cosine", lr_warmup_steps=2, lr_end=0.2)
    assert [learning_rate(cosine, n, 10) for n in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(cosine, 6, 10) == pytest.approx(0.6)
    assert learning_rate(cosine, 10, 10) == pytest.approx(0.2)
    constant = OptimizerSettings(learning_rate=0.3)
    assert {learning_rate(constant, n, 10) for n in range(10)} == {0.3}


def test_parameters_named_apart_have_their_own_rate(tmp_path):
    stage = _Stage(steps=1)
    stage.players[0].learning_rates = {"layer.bias": 0.05}
    before = _weights(stage).clone()
    train(stage, tmp_path, {})
    moved = (_weights(stage) - before).abs()  # the first step of Adam moves by the learning rate
    torch.testing.assert_close(moved, torch.tensor([0.01, 0.01, 0.01, 0.05]), rtol=1e-3, atol=1e-5)
