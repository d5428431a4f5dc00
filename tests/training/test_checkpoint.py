"""Checkpoints hold everything, are whole or absent, and refuse what does not fit."""

import pytest
import torch
from torch import nn

from davae.errors import DavaeError
from davae.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
)


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
    save_checkpoint(
        tmp_path, 5, {"model": module_tensors(model), "opt": optimizer_tensors(optimizer)}, {}, keep=1
    )
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


def test_frozen_weights_are_not_written():
    model, _ = _fresh()
    assert "0.bias" not in module_tensors(model)
    assert "1.running_mean" in module_tensors(model)


def test_only_the_newest_stay_and_order_is_by_step(tmp_path):
    for step in (5, 20, 100):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-20", "step-100"]


def test_a_partial_folder_is_no_checkpoint(tmp_path):
    (tmp_path / ".step-7.partial").mkdir()
    save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    assert [p.name for p in checkpoints(tmp_path)] == ["step-5"]


def test_a_damaged_file_is_named(tmp_path):
    path = save_checkpoint(tmp_path, 5, {"model": {"w": torch.ones(1)}}, {}, keep=2)
    (path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(DavaeError, match=r"step-5 cannot be read"):
        load_checkpoint(path)


def test_other_weights_are_refused_by_name(tmp_path):
    model, _ = _fresh()
    tensors = module_tensors(model)
    with pytest.raises(DavaeError, match=r"'2\.weight'"):
        restore_module(model, {k: v for k, v in tensors.items() if k != "2.weight"}, tmp_path)
    with pytest.raises(DavaeError, match="has shape"):
        restore_module(model, {**tensors, "2.weight": torch.ones(5, 5)}, tmp_path)
