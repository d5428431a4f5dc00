"""Which weights AdamW lets decay."""

import importlib.util

import pytest
import torch
from torch import nn

from davae.recipes.loop import OptimizerSettings
from davae.training.engine.optimizer import make_optimizer

RATE, DECAY = 0.5, 0.1
KINDS = [
    "adamw",
    pytest.param(
        "adamw8bit",
        marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
    ),
]


def _module() -> nn.Sequential:
    """Convolution, norm and linear layer; every weight and bias is 1."""
    module = nn.Sequential(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.Linear(4, 4))
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("only_matrices", [True, False])
def test_decay_of_norms_and_biases_is_a_choice(kind: str, only_matrices: bool) -> None:
    """Without gradients a step is decay alone: a weight shrinks by the learning rate times the decay."""
    module = _module()
    settings = OptimizerSettings(kind=kind, learning_rate=RATE, weight_decay=DECAY, decay_only_matrices=only_matrices)
    optimizer = make_optimizer("model", module, settings, {"2.weight": RATE / 2})
    for group in optimizer.param_groups:
        group["lr"] = RATE * group["rate_factor"]
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    vectors = 1.0 if only_matrices else 1 - RATE * DECAY
    expected = {"0.weight": 1 - RATE * DECAY, "2.weight": 1 - RATE / 2 * DECAY}
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, expected.get(name, vectors)))


def test_without_decay_there_is_one_group_and_matrices_decay_by_default() -> None:
    assert len(make_optimizer("model", _module(), OptimizerSettings(learning_rate=RATE), {}).param_groups) == 1
    decaying = make_optimizer("model", _module(), OptimizerSettings(learning_rate=RATE, weight_decay=DECAY), {})
    found = {p.ndim > 1: group["weight_decay"] for group in decaying.param_groups for p in group["params"]}
    assert found == {True: DECAY, False: 0.0}
