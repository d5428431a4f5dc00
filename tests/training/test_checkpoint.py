"""Checkpoints hold everything, are whole or absent, and refuse what does not fit."""

import errno
import hashlib
import json
import os
import pickle

import pytest
import torch
from tests.conftest import small_tmpfs
from torch import nn

from davae.errors import DavaeError
from davae.training.checkpoints.checkpoint import (
    CheckpointWriter,
    checkpoints,
    load_checkpoint,
    newest_whole,
    save_checkpoint,
)
from davae.training.engine.tensors import (
    changing_buffers,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte, where the tests may make one."""
    with small_tmpfs(tmp_path / "disk", 1) as folder:
        yield folder


def _trained(steps, model, optimizer):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(4, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def _fresh():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def test_a_restored_optimizer_goes_on_as_if_nothing_happened(tmp_path):
    model, optimizer = _fresh()
    _trained(5, model, optimizer)
    save_checkpoint(tmp_path, 5, {"model": module_tensors(model), "opt": optimizer_tensors(optimizer)}, {}, keep=1)
    other, other_optimizer = _fresh()
    tensors, values = load_checkpoint(checkpoints(tmp_path)[-1])
    restore_module(other, tensors["model"], tmp_path)
    restore_optimizer(other_optimizer, tensors["opt"])
    _trained(3, model, optimizer)
    _trained(3, other, other_optimizer)
    assert values["step"] == 5
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


def test_moments_get_the_memory_order_of_their_weights(tmp_path):
    """Fused AdamW walks through memory: a channels-last weight needs channels-last moments."""

    def fresh():
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)

    def step(layer, optimizer, seed):
        images = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        layer(images.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()

    layer, optimizer = fresh()
    step(layer, optimizer, 0)
    save_checkpoint(tmp_path, 1, {"m": module_tensors(layer), "o": optimizer_tensors(optimizer)}, {}, keep=1)
    other, other_optimizer = fresh()
    tensors, _ = load_checkpoint(checkpoints(tmp_path)[-1])
    restore_module(other, tensors["m"], tmp_path)
    restore_optimizer(other_optimizer, tensors["o"])
    step(layer, optimizer, 1)
    step(other, other_optimizer, 1)
    assert torch.equal(layer.weight, other.weight)


def test_frozen_weights_and_constants_are_not_written():
    model, _ = _fresh()
    model.register_buffer("table", torch.ones(3))
    statistics = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert changing_buffers(model).keys() == statistics
    assert module_tensors(model).keys() == {"0.weight", "1.weight", "1.bias", "2.weight", "2.bias"} | statistics


def test_a_checkpoint_that_holds_constants_too_is_read_and_they_stay(tmp_path):
    model, _ = _fresh()
    model.register_buffer("table", torch.ones(3))
    saved = {name: value + 1 for name, value in module_tensors(model).items()}
    restore_module(model, {**saved, "table": torch.zeros(3)}, tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in module_tensors(model).items())
    assert torch.equal(model.table, torch.ones(3))
    with pytest.raises(DavaeError, match=r"1 names differ, first '0\.bias'"):
        restore_module(model, {**saved, "0.bias": torch.zeros(4)}, tmp_path)  # it was trained then


def test_only_the_newest_stay_and_order_is_by_step(tmp_path):
    for step in (5, 20, 100):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-20", "step-100"]


def test_a_partial_folder_is_no_checkpoint_and_is_swept_away(tmp_path):
    (tmp_path / ".step-7.partial").mkdir()
    (tmp_path / ".step-3.removed").mkdir()
    assert checkpoints(tmp_path) == []
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]


def _damage_flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _damage_flip_high(path):
    """No text any more."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x80
    path.write_bytes(content)


def _damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def _damage_to(text):
    return lambda path: path.write_text(text)


def _damage_forget_model(path):
    facts = json.loads(path.read_text())
    del facts["model.safetensors"]
    path.write_text(json.dumps(facts))


_DAMAGE = {
    "flip": _damage_flip,
    "high bit": _damage_flip_high,
    "cut": _damage_truncate,
    "empty": _damage_to(""),
    "gone": lambda path: path.unlink(),
}
_DAMAGE_OF_MANIFESTS = {
    "a list": _damage_to("[]"),
    "nothing in it": _damage_to("{}"),
    "a name that is none": _damage_to('{"state.json": {}, "model.safetensors": {}, "\\u0000": {}}'),
    "without the model": _damage_forget_model,
}


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        pytest.param(file, damage, id=f"{file}-{name}")
        for file in ("model.safetensors", "state.json", "manifest.json")
        for name, damage in (_DAMAGE | (_DAMAGE_OF_MANIFESTS if file == "manifest.json" else {})).items()
    ],
)
def test_the_newest_whole_checkpoint_is_used_and_the_broken_one_reported(tmp_path, caplog, damage, file):
    for step in (5, 6):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.full((4,), float(step))}}, {}, keep=2)
    damage(tmp_path / "step-6" / file)
    path, tensors, values = newest_whole(tmp_path, ["model"])
    assert (path.name, values["step"]) == ("step-5", 5)
    assert torch.equal(tensors["model"]["w"], torch.full((4,), 5.0))
    assert "step-6 is broken" in caplog.text


def test_a_broken_one_does_not_push_whole_ones_out(tmp_path):
    """A run that goes on from step 4 because step 8 is broken must not lose step 6 to step 8."""
    for step in (4, 8):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    _damage_flip(tmp_path / "step-8" / "model.safetensors")
    save_checkpoint(tmp_path, 6, {"model": {"w": torch.ones(1)}}, {}, keep=1)
    assert newest_whole(tmp_path)[0].name == "step-6"
    save_checkpoint(tmp_path, 8, {"model": {"w": torch.ones(1)}}, {}, keep=1)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-8"]
    assert newest_whole(tmp_path)[0].name == "step-8"


def test_no_whole_checkpoint_is_not_a_fresh_start(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    (path / "manifest.json").unlink()
    with pytest.raises(DavaeError, match="none of the 1 checkpoints"):
        newest_whole(tmp_path)


def test_a_full_disk_leaves_the_old_ones_whole_and_says_so(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(1)}}, {}, keep=1)

    def full(named, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("davae.training.checkpoints.checkpoint.save_file", full)
    with pytest.raises(DavaeError, match=r"disk is full: the checkpoint of step 6 needs 4 MB.*step-5 is whole"):
        save_checkpoint(tmp_path, 6, {"model": {"w": torch.ones(10**6)}}, {}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-5"]
    load_checkpoint(tmp_path / "step-5")


def test_on_a_disk_that_is_really_full(small_disk):
    save_checkpoint(small_disk, 5, {"model": {"w": torch.ones(10)}}, {}, keep=2)
    with pytest.raises(DavaeError, match="disk is full"):
        save_checkpoint(small_disk, 6, {"model": {"w": torch.ones(10**6)}}, {}, keep=2)
    assert newest_whole(small_disk)[0].name == "step-5"


def test_the_writer_keeps_the_best(tmp_path):
    with CheckpointWriter(tmp_path, keep=1, best_mode="max") as writer:
        for step, value in ((1, 0.1), (2, 0.9), (3, 0.5), (4, None)):
            writer.save(step, {"model": {"w": torch.full((3,), step)}}, {})
            if value is not None and writer.is_best(value):
                writer.keep_best(step, value)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-2", "step-4"]
    for step in (2, 4):
        assert torch.equal(load_checkpoint(tmp_path / f"step-{step}")[0]["model"]["w"], torch.full((3,), step))
    again = CheckpointWriter(tmp_path, keep=1, best_mode="max")
    assert not again.is_best(0.8)
    assert again.is_best(1.0)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_value_that_is_not_finite_is_never_the_best(tmp_path, mode):
    with CheckpointWriter(tmp_path, keep=5, best_mode=mode) as writer:
        for value in (float("nan"), float("inf"), float("-inf")):
            assert not writer.is_best(value)
        assert writer.best is None
        writer.save(4, {"model": {"w": torch.ones(1)}}, {})
        writer.keep_best(4, 1.0)
        assert not writer.is_best(float("nan"))
    noted = json.loads((tmp_path / "best.json").read_text())
    assert noted == {"step": 4, "value": 1.0, "metric": None, "mode": mode}


def test_the_best_of_another_metric_or_mode_is_none(tmp_path):
    """A run may resume with another ``best_metric``: its values are not compared with those of the one before."""
    with CheckpointWriter(tmp_path, keep=1, best_metric="psnr", best_mode="max") as writer:
        writer.save(1, {"model": {"w": torch.ones(1)}}, {})
        writer.keep_best(1, 30.0)
    assert not CheckpointWriter(tmp_path, keep=1, best_metric="psnr", best_mode="max").is_best(29.0)
    assert CheckpointWriter(tmp_path, keep=1, best_metric="alignment", best_mode="max").is_best(0.1)
    assert CheckpointWriter(tmp_path, keep=1, best_metric="psnr", best_mode="min").is_best(31.0)
    (tmp_path / "best.json").write_text('{"step": 1, "value": 30.0}')  # of an earlier version
    assert not CheckpointWriter(tmp_path, keep=1, best_metric="psnr", best_mode="max").is_best(29.0)


@pytest.mark.parametrize("text", ["", '{"step": 3, "va', "[]", '{"step": 3}', '{"step": 3, "value": NaN}'])
def test_a_damaged_note_of_the_best_is_as_none(tmp_path, text, caplog):
    (tmp_path / "best.json").write_text(text)
    assert CheckpointWriter(tmp_path, keep=1).is_best(1e9)
    assert "best.json" in caplog.text


def test_the_best_before_stays_until_the_new_one_is_noted(tmp_path, monkeypatch):
    """Killed between the two, the run still has the checkpoint that best.json names."""

    def killed(*_):
        raise KeyboardInterrupt

    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, {"model": {"w": torch.ones(1)}}, {})
    writer.keep_best(1, 2.0)
    monkeypatch.setattr("davae.training.checkpoints.checkpoint.atomic_write", killed)
    writer.save(2, {"model": {"w": torch.ones(1)}}, {})
    with pytest.raises(KeyboardInterrupt):
        writer.keep_best(2, 1.0)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-1", "step-2"]
    assert json.loads((tmp_path / "best.json").read_text())["step"] == 1


def test_what_goes_wrong_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise DavaeError("the disk is full")

    monkeypatch.setattr("davae.training.checkpoints.checkpoint.save_checkpoint", broken)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(1, {}, {})
    with pytest.raises(DavaeError, match="disk is full"):
        writer.wait()
    writer.wait()  # told once


def test_other_weights_are_refused_by_name(tmp_path):
    model, _ = _fresh()
    tensors = module_tensors(model)
    with pytest.raises(DavaeError, match=r"'2\.weight'"):
        restore_module(model, {k: v for k, v in tensors.items() if k != "2.weight"}, tmp_path)
    with pytest.raises(DavaeError, match="has shape"):
        restore_module(model, {**tensors, "2.weight": torch.ones(5, 5)}, tmp_path)


class _Harmful:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


@pytest.mark.parametrize("pretended", ["pickle", "elsewhere"])
def test_a_checkpoint_with_a_fitting_manifest_cannot_run_code_or_lead_out(tmp_path, pretended, monkeypatch):
    """Whoever brings a checkpoint can bring its hashes too."""
    monkeypatch.chdir(tmp_path)
    path = save_checkpoint(tmp_path / "run", 5, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    if pretended == "pickle":
        name = "model.safetensors"
        (path / name).write_bytes(pickle.dumps(_Harmful()))
        content = (path / name).read_bytes()
        manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    else:
        other = save_checkpoint(tmp_path / "other", 5, {"model": {"w": torch.zeros(1)}}, {}, keep=2)
        facts = json.loads((other / "manifest.json").read_text())["model.safetensors"]
        manifest["../../other/step-5/model.safetensors"] = facts
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DavaeError, match="step-5 is broken"):
        load_checkpoint(path)
    assert not (tmp_path / "it-ran").exists()
