"""The loop on a stage small enough to follow: stopping, continuing, averaging, schedules, guards."""

import functools
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import sqlite3
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from davae.errors import DavaeError
from davae.recipes.loop import LoopSettings, OptimizerSettings
from davae.runtime.atomic_files import make_folder
from davae.training.checkpoints.checkpoint import checkpoints
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.engine.optimizer import learning_rate
from davae.training.loop.loop import train
from davae.training.loop.signals import TrainingStopped
from davae.training.stage import Stage, TrainedModule


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
        self.modules = [TrainedModule("model", self.objective, OptimizerSettings(learning_rate=0.01))]

    def validate(self, samples, step):
        return {"weight": float(self.objective.layer.weight.sum())}

    def export(self, out):
        torch.save({}, out / "unused")
        return out


def _weights(stage):
    return torch.cat([p.detach().flatten() for p in stage.objective.parameters()])


@pytest.mark.parametrize("log_every", [1, 3])  # with three, stops fall between two logged lines
@pytest.mark.parametrize("stops", [[4], [3], [1, 2, 5]])
def test_a_run_that_stops_ends_like_one_that_does_not(tmp_path, stops, log_every):
    settings = {"ema_decay": 0.9, "gradient_accumulation": 2, "log_every": log_every}
    whole = _Stage(**settings)
    train(whole, tmp_path / "whole", {})
    for stop in stops:
        assert train(_Stage(**settings), tmp_path / "parts", {}, stop_after=stop) is None
    last = _Stage(**settings)
    train(last, tmp_path / "parts", {})
    assert torch.equal(_weights(whole), _weights(last))
    assert read_metrics(tmp_path / "whole" / "metrics.jsonl") == read_metrics(tmp_path / "parts" / "metrics.jsonl")


def test_modules_that_come_in_eval_mode_are_trained_in_train_mode(tmp_path):
    stage = _Stage(steps=1)
    stage.objective.eval()
    stage.objective.register_forward_pre_hook(lambda module, _: modes.append(module.layer.training))
    modes = []
    train(stage, tmp_path, {})
    assert modes == [True]


def test_validations_are_told_when_they_are_made_and_the_last_with_the_result(tmp_path, caplog):
    with caplog.at_level("INFO", logger="davae"):
        result = train(_Stage(steps=3, validate_every=1, validate_at_start=True), tmp_path, {})
    told = [record.message for record in caplog.records if "held-out images" in record.message]
    assert [line.split(": ")[0] for line in told] == [f"toy, step {step}, held-out images" for step in range(3)]
    logged = {line["step"]: line["weight"] for line in read_metrics(tmp_path / "metrics.jsonl") if "weight" in line}
    assert [line.split()[-1] for line in told] == [f"{logged[step]:.4g}" for step in range(3)]
    assert result.metrics["weight"] == logged[3]


def test_gradients_are_let_go_before_checkpoints_and_validations(tmp_path):
    """Their memory is that of the validation's images."""
    stage = _Stage(steps=2, validate_every=1)
    seen = []

    def validate(samples, step):
        seen.append(stage.objective.layer.weight.grad)
        return {}

    stage.validate = validate
    train(stage, tmp_path, {})
    assert seen == [None, None, None]  # the last one of the result


def test_every_image_once_an_epoch(tmp_path):
    stage = _Stage(steps=7)
    train(stage, tmp_path, {})
    assert sorted(stage.objective.seen[:7]) == sorted(stage.objective.seen[7:14]) == [str(i) for i in range(7)]


def test_accumulated_micro_steps_equal_one_gradient(tmp_path):
    """Two micro-batches are averaged, not added."""
    stage = _Stage(steps=1, gradient_accumulation=2, max_grad_norm=1e9)
    train(stage, tmp_path, {})
    logged = read_metrics(tmp_path / "metrics.jsonl")[0]
    fresh = _Objective()
    from davae.data import BatchStream
    from davae.training.loop.rng import _seed_step

    stream = iter(BatchStream(_Numbers(), 2, seed=0))
    total = 0.0
    for micro in range(2):
        batch = next(stream)
        _seed_step(0, 0, micro)
        total = total + fresh(batch, 0)["total"] / 2
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in fresh.parameters()]).norm()
    assert logged["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    assert logged["total"] == pytest.approx(float(total), rel=1e-5)


def test_a_step_that_is_not_finite_is_left_out_counted_and_told(tmp_path, caplog):
    """The weights go on as if the step had not been; the term and the images are named."""
    stage = _Stage(steps=3)
    stage.objective.bad_step = 1
    weights = []
    stage.validate = lambda samples, step: {"weight": 0.0}
    stage.objective.register_forward_pre_hook(lambda *_: weights.append(_weights(stage).clone()))
    train(stage, tmp_path, {})
    assert not torch.equal(weights[0], weights[1])
    assert torch.equal(weights[1], weights[2])  # the second step was left out
    assert not torch.equal(weights[2], _weights(stage))
    assert _weights(stage).isfinite().all()
    message = json.loads((tmp_path / "skipped_steps.jsonl").read_text())
    assert (message["step"], message["terms"], message["ids"]) == (2, ["total"], stage.objective.seen[2:4])
    assert "step 2 is skipped: loss 'total' is not finite" in caplog.text
    logged = read_metrics(tmp_path / "metrics.jsonl")
    assert "total" not in logged[1]
    assert [line.get("skipped_steps") for line in logged[:3]] == [None, 1, 1]


def test_a_skipped_step_is_no_update_of_the_averages(tmp_path):
    """Closed form over the good steps only; a discriminator's bad step is none of the model's."""
    for folder, bad, updates in ((tmp_path / "model", 0, 2), (tmp_path / "other", 1, 3)):
        stage = _Stage(steps=3, ema_decay=0.999, checkpoint_every=3)
        other = _Objective()
        stage.modules.append(TrainedModule("discriminator", other, OptimizerSettings(learning_rate=0.01)))
        stage.modules[bad].module.bad_step = 1
        weights = [_weights(stage).clone()]
        other.register_forward_pre_hook(lambda *_, w=weights, s=stage: w.append(_weights(s).clone()))
        train(stage, folder, {})
        good = [w for step, w in enumerate([*weights[2:], _weights(stage)]) if bad or step != 1]
        expected = weights[0]
        for n, value in enumerate(good, start=1):
            expected = expected.lerp(value, 1 - (1 + n) / (10 + n))
        checkpoint = folder / "checkpoints" / "step-3"
        averages = load_file(checkpoint / "averages.safetensors")
        torch.testing.assert_close(torch.cat([averages["0"].flatten(), averages["1"]]), expected)
        assert json.loads((checkpoint / "state.json").read_text())["ema_updates"] == updates


def test_a_gradient_that_is_not_finite_names_its_layer(tmp_path, caplog):
    stage = _Stage(steps=2)
    stage.objective.layer.bias.register_hook(lambda g: g * float("inf"))
    with pytest.raises(DavaeError, match="nothing was learnt and nothing is written"):
        train(stage, tmp_path, {})
    assert "the gradient of layer.bias is not finite" in caplog.text
    assert torch.equal(_weights(stage), _weights(_Stage()))


def test_too_steep_a_step_is_skipped(tmp_path):
    stage = _Stage(steps=2, skip_grad_norm=1e-6)
    with pytest.raises(DavaeError, match=r"every one of the 2 steps was skipped.*a loop\.skip_grad_norm above 1e-06"):
        train(stage, tmp_path, {})
    assert not (tmp_path / "unused").exists()
    with pytest.raises(DavaeError, match="every one of the 2 steps"):  # and again
        train(_Stage(steps=2, skip_grad_norm=1e-6), tmp_path, {})
    train(_Stage(steps=4, skip_grad_norm=1e6), tmp_path, {})  # the advice, and steps to learn in
    assert torch.equal(_weights(stage), _weights(_Stage()))
    message = (tmp_path / "skipped_steps.jsonl").read_text().splitlines()
    assert len(message) == 2
    assert "exceeds skip_grad_norm" in message[0]


def test_too_many_bad_steps_in_a_row_end_the_run_and_leave_the_batch(tmp_path):
    stage = _Stage(max_skipped_steps=3)
    stage.objective.layer.weight.register_hook(lambda g: g * float("nan") if len(seen) > 2 else g)
    seen = []
    stage.objective.register_forward_pre_hook(lambda *_: seen.append(1))
    with pytest.raises(DavaeError, match=r"toy: 3 steps in a row"):
        train(stage, tmp_path, {})
    assert len(seen) == 5
    batch = load_file(tmp_path / "failure" / "batch.safetensors")
    assert batch["image"].shape == (2, 3)
    assert json.loads((tmp_path / "failure" / "batch.json").read_text())["id"] == stage.objective.seen[-2:]
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-4", "step-5"]


def test_running_statistics_survive_a_bad_step(tmp_path):
    stage = _Stage(steps=1)
    norm = nn.BatchNorm1d(3)
    stage.objective.layer = nn.Sequential(norm, nn.Linear(3, 1))
    stage.objective.bad_step = 0
    stage.validate = lambda samples, step: {"weight": 0.0}
    with pytest.raises(DavaeError, match="every one of the 1 steps was skipped"):
        train(stage, tmp_path, {})
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert int(norm.num_batches_tracked) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on_later(tmp_path, number):
    whole = _Stage()
    train(whole, tmp_path / "whole", {})
    stage = _Stage()
    stage.objective.register_forward_pre_hook(
        lambda *_: os.kill(os.getpid(), number) if len(stage.objective.seen) == 4 else None
    )
    handler = signal.getsignal(number)
    with pytest.raises(TrainingStopped, match=r"after step 3 of 8; everything is saved"):
        train(stage, tmp_path / "parts", {})
    assert signal.getsignal(number) is handler
    last = _Stage()
    train(last, tmp_path / "parts", {})
    assert torch.equal(_weights(whole), _weights(last))


@pytest.mark.parametrize("during", ["validate", "export"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_after_the_last_step_keeps_the_next_stage_from_beginning(tmp_path, during, number):
    """The result is written, and the caller hears of the signal: several stages are trained one after another."""
    stage = _Stage(steps=2)
    work = getattr(stage, during)

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return work(*arguments)

    setattr(stage, during, interrupted)
    with pytest.raises(TrainingStopped, match=r"after step 2 of 2; its result is written to .*what is left") as stopped:
        train(stage, tmp_path, {})
    assert stopped.value.signal == number
    assert (tmp_path / "unused").is_file()
    assert train(_Stage(steps=2), tmp_path, {}).steps == 2


def test_two_runs_in_one_directory_are_refused(tmp_path):
    refused = []
    files = [tmp_path / name for name in ("config.yaml", "environment.json")]

    class _Second(_Stage):
        def validate(self, samples, step):
            before = [file.read_bytes() for file in files]
            second = _Stage()
            second.facts = {"base": "another"}
            with pytest.raises(DavaeError, match=f"is in use: process {os.getpid()} on .* writes there"):
                # a setting that another run may change
                train(second, tmp_path, {"autoencoder": {"loop": {"log_every": 3}}})
            assert [file.read_bytes() for file in files] == before
            refused.append(True)
            return {"weight": 0.0}

    train(_Second(), tmp_path, {"autoencoder": {"loop": {"log_every": 1}}})
    assert refused
    train(_Stage(), tmp_path, {"autoencoder": {"loop": {"log_every": 3}}})  # free again
    assert "log_every: 3" in files[0].read_text()


def test_the_best_checkpoint_is_kept(tmp_path):
    stage = _Stage(steps=6, validate_every=1, checkpoints_total_limit=1, best_metric="value", checkpoint_every=3)
    values = {1: 5.0, 2: 1.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 5.0}
    stage.validate = lambda samples, step: {"value": values[step]}
    train(stage, tmp_path, {})
    assert [p.name for p in checkpoints(tmp_path / "checkpoints")] == ["step-2", "step-6"]
    stage = _Stage(steps=2, validate_every=1, checkpoints_total_limit=1, best_metric="swd", checkpoint_every=2)
    stage.validate = lambda samples, step: {"swd/finest": values[step]}  # the recipe is of an earlier run
    train(stage, tmp_path / "earlier", {})
    assert [p.name for p in checkpoints(tmp_path / "earlier" / "checkpoints")] == ["step-2"]
    stage = _Stage(best_metric="psnr", checkpoint_every=3)
    with pytest.raises(DavaeError, match=r"best_metric is 'psnr'.*measures weight"):
        train(stage, tmp_path / "other", {})
    right = _Stage(best_metric="weight", checkpoint_every=3)  # the advice
    train(right, tmp_path / "other", {})
    assert right.objective.seen == []  # nothing is trained twice


def test_what_fails_in_the_validation_costs_no_steps(tmp_path):
    """Every step is saved before it is measured, and measured later where that failed."""
    whole = _Stage(validate_every=4, best_metric="weight")
    train(whole, tmp_path / "whole", {})
    for step in (4, 8):
        broken = _Stage(validate_every=4, best_metric="weight")
        measure = broken.validate

        def fail(samples, done, step=step, measure=measure):
            if done == step:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return measure(samples, done)

        broken.validate = fail
        with pytest.raises(DavaeError, match=r"validation\. What was due is saved.*validation_images=8"):
            train(broken, tmp_path / "parts", {})
        assert (tmp_path / "parts" / "checkpoints" / f"step-{step}").is_dir()
    last = _Stage(validate_every=4, best_metric="weight", validation_images=8)  # the advice
    train(last, tmp_path / "parts", {})
    assert last.objective.seen == []
    assert torch.equal(_weights(whole), _weights(last))
    for name in ("metrics.jsonl", "checkpoints/best.json"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_without_held_out_images_nothing_is_measured_and_that_is_said(tmp_path, caplog):
    stage = _Stage(validate_every=2)
    stage.measured_on = ([],)
    stage.validate = lambda *_: pytest.fail("measured")
    with caplog.at_level("INFO", logger="davae"):
        assert train(stage, tmp_path, {}).metrics == {}
    assert [r.message for r in caplog.records if "nothing is measured" in r.message] == [
        "toy: no image is held out (data.hold_out), so nothing is measured"
    ]


def test_steps_of_this_life_that_were_all_skipped_are_no_success(tmp_path):
    train(_Stage(), tmp_path, {}, stop_after=6)
    stage = _Stage()
    stage.objective.layer.bias.register_hook(lambda g: g * float("nan"))
    with pytest.raises(DavaeError, match="every one of the 2 steps was skipped"):
        train(stage, tmp_path, {})


def test_latents_that_are_not_finite_are_named(tmp_path, caplog):
    class Latents(_Numbers):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            latent = torch.full((1, 2, 2), float("nan") if index == 3 else 0.0)
            return item | {"latent": latent, "image": item["image"] + latent.mean()}

    stage = _Stage(steps=4)
    stage.dataset = Latents()
    train(stage, tmp_path, {})
    assert "the latent of 3, made beforehand, is not finite" in caplog.text


def test_a_tracker_that_is_not_installed_is_told_before_the_first_step(tmp_path, monkeypatch):
    stage = _Stage(report_to=["tensorboard", "clearml"])
    with pytest.raises(DavaeError, match=r"clearml is not installed: `pip install clearml`.*report_to=\[tensorboard\]"):
        train(stage, tmp_path, {})
    assert stage.objective.seen == []
    train(_Stage(report_to=["tensorboard"], steps=1), tmp_path, {})
    assert list(tmp_path.glob("tracking/events*"))


def test_out_of_memory_says_what_helps_in_order(tmp_path):
    stage = _Stage(gradient_accumulation=2)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    stage.objective.register_forward_pre_hook(full)
    with pytest.raises(
        DavaeError, match=r"\(1\) .*gradient_checkpointing=true; \(2\) .*bf16; \(3\) .*batch_size=1 with .*=4"
    ):
        train(stage, tmp_path, {})


def test_another_recipe_in_the_same_directory_is_refused(tmp_path):
    train(_Stage(), tmp_path, {"loop": {"steps": 8}}, stop_after=2)
    with pytest.raises(DavaeError, match=r"loop\.steps: 8 -> 9"):
        train(_Stage(steps=9), tmp_path, {"loop": {"steps": 9}})


def test_a_finished_run_called_again_only_reports(tmp_path):
    first = _Stage()
    train(first, tmp_path, {})
    again, modes = _Stage(), []
    measure = again.validate
    again.validate = lambda *a: modes.append((again.objective.training, torch.is_grad_enabled())) or measure(*a)
    result = train(again, tmp_path, {})
    assert modes == [(False, False)]
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
    stage.modules[0].learning_rates = {"layer.bias": 0.05}
    before = _weights(stage).clone()
    train(stage, tmp_path, {})
    moved = (_weights(stage) - before).abs()  # the first step of Adam moves by the learning rate
    torch.testing.assert_close(moved, torch.tensor([0.01, 0.01, 0.01, 0.05]), rtol=1e-3, atol=1e-5)


def test_a_loader_process_that_dies_in_the_middle_of_a_step_is_told(tmp_path):
    stage = _Stage()

    def news(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")  # torch's handler of SIGCHLD

    stage.objective.register_forward_pre_hook(news)
    with pytest.raises(DavaeError, match=r"toy: a loader process was killed.*data\.workers"):
        train(stage, tmp_path, {})


class _Tracker:
    """Stands for the module ``wandb``: keeps what it is given."""

    __spec__ = importlib.machinery.ModuleSpec("wandb", None)

    def __init__(self):
        self.begun, self.logged, self.config, self.finished = [], [], {}, 0

    def init(self, **options):
        self.begun.append(options)
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def Image(self, picture):
        return picture.size

    def finish(self):
        self.finished += 1


def test_a_tracker_gets_name_settings_and_pictures_and_goes_on_with_the_run(tmp_path, monkeypatch):
    wandb = _Tracker()
    wandb.config = SimpleNamespace(update=lambda values, **_: wandb.logged.append(("config", values)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    recipe = {"kind": "toy", "section": {"steps": 2, "sizes": [1, 2]}}

    def stage(**loop):
        made = _Stage(report_to=["wandb"], tracker_project_name="photos", **loop)
        made.validate = functools.partial(_validate, name="step-{}.png")
        return made

    train(stage(validate_every=4), tmp_path / "runs" / "mine", recipe, stop_after=4)
    train(stage(), tmp_path / "runs" / "mine", recipe)
    first, second = wandb.begun
    assert first == second
    assert (first["project"], first["name"], first["resume"]) == ("photos", "mine", "allow")
    assert ("config", {"kind": "toy", "section.steps": 2, "section.sizes": "[1, 2]"}) in wandb.logged
    pictures = [(step, values["samples"]) for step, values in wandb.logged if "samples" in values]
    assert pictures == [(4, [(4, 2)]), (8, [(4, 2)])]
    assert wandb.finished == 2


def _validate(samples, step, name):
    """Write a picture of 4 x 2 pixels."""
    Image.new("RGB", (4, 2)).save(make_folder(samples) / name.format(step))
    return {"weight": 1.0}


def test_trackio_has_one_run_with_settings_and_pictures_that_goes_on(tmp_path, monkeypatch):
    """With the real package, in a folder of its own: it reads where to write when it is imported."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")

    def stage():
        made = _Stage(report_to=["trackio"], tracker_project_name="photos")
        made.validate = functools.partial(_validate, name="step-{}.png")
        return made

    for last in (4, None):
        train(stage(), tmp_path / "mine", {"kind": "toy"}, stop_after=last)
    (run,) = trackio.Api().runs("photos")
    assert run.config["kind"] == "toy"
    file = next((tmp_path / "trackio").glob("photos*.db"))
    with closing(sqlite3.connect(file)) as found:
        logged = [(step, json.loads(values)) for step, values in found.execute("select step, metrics from metrics")]
    assert [step for step, values in logged if "total" in values] == list(range(1, 9))
    assert [step for step, values in logged if "samples" in values] == [8]


def test_tensorboard_has_settings_and_pictures_and_hides_what_is_made_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def stage():
        made = _Stage(report_to=["tensorboard"])
        made.validate = functools.partial(_validate, name="step-{}-side.png")
        return made

    train(stage(), tmp_path, {"kind": "toy"}, stop_after=6)
    shutil.rmtree(tmp_path / "checkpoints" / "step-6")
    train(stage(), tmp_path, {"kind": "toy"})
    found = EventAccumulator(str(tmp_path / "tracking"))
    found.Reload()
    assert [event.step for event in found.Scalars("total")] == list(range(1, 9))
    assert [event.step for event in found.Images("samples/side")] == [8]
    assert b"kind: toy" in found.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]


def test_a_tracker_that_does_not_start_is_told_in_one_line(tmp_path, monkeypatch):
    wandb = _Tracker()

    def init(**_):
        raise ValueError("api_key not configured\n(no-tty)")

    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(
        DavaeError, match=r"^loop.report_to: wandb does not start \(api_key not configured \(no-tty\)\)"
    ):
        train(_Stage(report_to=["wandb"]), tmp_path, {})


@pytest.mark.skipif(importlib.util.find_spec("schedulefree") is None, reason="needs schedulefree")
def test_schedule_free_training_measures_and_exports_its_averages_and_goes_on_exactly(tmp_path):
    def stage():
        made = _Stage(validate_every=2)
        made.modules[0].optimizer = OptimizerSettings(kind="schedule_free", learning_rate=0.01)
        made.export = lambda out: exported.append(_weights(made).clone()) or out
        return made

    exported = []
    whole = stage()
    train(whole, tmp_path / "whole", {})
    assert train(stage(), tmp_path / "parts", {}, stop_after=3) is None
    last = stage()
    train(last, tmp_path / "parts", {})
    assert torch.equal(_weights(whole), _weights(last))
    assert torch.equal(exported[0], exported[1])
    assert not torch.equal(exported[0], _weights(whole))
    measured = [line for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "weight" in line]
    assert measured == [line for line in read_metrics(tmp_path / "parts" / "metrics.jsonl") if "weight" in line]
    assert measured[-1]["weight"] == pytest.approx(float(exported[0][:3].sum()))
