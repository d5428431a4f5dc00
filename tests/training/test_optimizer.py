"""Optimizers and schedules by name: which weights decay, that all resume exactly, what is refused."""

import importlib.util
import sys

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from davae.errors import DavaeError
from davae.recipes import checks
from davae.recipes.checks import check_settings
from davae.recipes.loop import OptimizerSettings
from davae.recipes.read import load_recipe
from davae.training.engine.optimizer import learning_rate, make_optimizer
from davae.training.engine.tensors import optimizer_tensors, restore_optimizer

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


def _needs(package: str, *kinds: str) -> list:
    skip = pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}")
    return [pytest.param(kind, marks=skip) for kind in kinds]


OTHERS = [
    *_needs("transformers", "adafactor", "muon"),
    *_needs("prodigyopt", "prodigy"),
    *_needs("schedulefree", "schedule_free"),
    *_needs("bitsandbytes", "adamw8bit", "paged_adamw8bit"),
]


class _Blocks(nn.Module):
    """A convolution, two blocks, and a head that is no part of a block."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).mean((2, 3))
        for block in self.blocks:
            x = x + block(x).relu()
        out: torch.Tensor = self.head(x)
        return out


def _settings(kind: str, **more: object) -> OptimizerSettings:
    return OptimizerSettings(kind=kind, learning_rate=1.0 if kind == "prodigy" else 1e-2, weight_decay=0.1, **more)


def _steps(module: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> list[float]:
    losses = []
    for number in numbers:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(number))
        loss = (module(x) - x.mean((1, 2, 3))[:, None]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _weights(module: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("kind", OTHERS)
def test_every_optimizer_learns_goes_on_bit_by_bit_and_leaves_bad_steps_out(kind: str) -> None:
    undisturbed, first, second = _Blocks(), _Blocks(), _Blocks()
    optimizer = make_optimizer("model", undisturbed, _settings(kind), {})
    losses = _steps(undisturbed, optimizer, range(8))
    if kind != "prodigy":  # whose rate is still growing
        assert sum(losses[-3:]) < sum(losses[:3])

    optimizer = make_optimizer("model", first, _settings(kind), {})
    _steps(first, optimizer, range(4))
    before = _weights(first)
    optimizer.found_inf = torch.tensor(1.0)
    _steps(first, optimizer, range(90, 91))
    assert torch.equal(_weights(first), before)

    kept = {name: value.clone().contiguous() for name, value in optimizer_tensors(optimizer).items()}
    second.load_state_dict({name: value.clone() for name, value in first.state_dict().items()})
    optimizer = make_optimizer("model", second, _settings(kind), {})
    restore_optimizer(optimizer, kept)
    _steps(second, optimizer, range(4, 8))
    assert torch.equal(_weights(undisturbed), _weights(second))
    assert not torch.equal(_weights(second), before)


@pytest.mark.parametrize("kind", [*_needs("prodigyopt", "prodigy"), *_needs("schedulefree", "schedule_free")])
def test_numbers_of_groups_survive_another_division_into_groups(kind: str) -> None:
    """With another weight decay on resume the groups differ; what was found of the whole run is kept."""
    module = _Blocks()
    optimizer = make_optimizer("model", module, _settings(kind), {})
    _steps(module, optimizer, range(3))
    kept = optimizer_tensors(optimizer)
    alike = make_optimizer("model", module, _settings(kind, decay_only_matrices=False), {})
    restore_optimizer(alike, kept)
    assert (len(alike.param_groups), len(optimizer.param_groups)) == (1, 2)
    name = "d" if kind == "prodigy" else "weight_sum"
    assert alike.param_groups[0][name] == optimizer.param_groups[0][name] > 0
    assert alike.param_groups[0]["k"] == 3


def test_muon_takes_the_matrices_within_blocks_and_its_steps_have_the_size_of_adamws() -> None:
    module = _Blocks()
    optimizer = make_optimizer("model", module, OptimizerSettings(kind="muon", learning_rate=0.1), {})
    x = torch.randn(4, 3, 6, 6)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module(x).square().mean().backward()
    optimizer.step()
    state = {name: set(optimizer.state[p]) for name, p in module.named_parameters()}
    with_momentum = {name for name, found in state.items() if found == {"momentum_buffer"}}
    assert with_momentum == {"blocks.0.weight", "blocks.1.weight"}
    update = before["blocks.0.weight"] - module.blocks[0].weight.detach()
    spectrum = torch.linalg.svdvals(update)  # orthogonal but for zeros of the gradient, with a root mean square of 0.2
    assert spectrum.max() < 1.6 * 0.1 * 0.2 * 8**0.5


def test_without_its_package_an_optimizer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(DavaeError, match=r"pip install prodigyopt.*optimizer.kind=adamw"):
        make_optimizer("model", _Blocks(), _settings("prodigy"), {})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"lr_scheduler": "constant_with_warmup"}, {"name": "constant"}),
        ({"lr_scheduler": "cosine"}, {"name": "cosine"}),
        ({"lr_scheduler": "linear"}, {"name": "linear"}),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3},
            {"name": "cosine_with_restarts", "num_cycles": 3},
        ),
        ({"lr_scheduler": "polynomial", "lr_power": 2.0, "lr_end": 1e-7}, {"name": "polynomial", "power": 2.0}),
        (
            {"lr_scheduler": "piecewise_constant", "lr_step_rules": "1:3,0.5:8,0.1"},
            {"name": "piecewise_constant", "step_rules": "1:3,0.5:8,0.1"},
        ),
    ],
)
def test_schedules_are_those_of_diffusers(ours: dict, theirs: dict) -> None:
    settings = OptimizerSettings(learning_rate=0.5, **ours)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(()))], lr=0.5)
    schedule = get_scheduler(optimizer=optimizer, num_warmup_steps=0, num_training_steps=20, **theirs)
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [learning_rate(settings, step, 20) for step in range(20)] == pytest.approx(expected)


def test_a_warm_up_below_one_is_a_share_of_the_steps() -> None:
    settings = OptimizerSettings(learning_rate=1.0, lr_warmup_steps=0.2)
    assert [learning_rate(settings, step, 10) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["kind=prodigy"], "learning_rate=1, not"),
        (["kind=schedule_free"], r"loop\.ema_decay=null"),
        (["kind=schedule_free", "lr_scheduler=cosine"], r"lr_scheduler=constant"),
        (["lr_step_rules=1:a,2"], "1:1000,0.1:2000,0.01"),
        (["lr_warmup_steps=2.5"], "whole steps, or a share"),
    ],
)
def test_what_does_not_go_with_an_optimizer_is_told(
    overrides: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_is_installed", lambda package: True)
    more = [] if "ema" in told else ["autoencoder.loop.ema_decay=null"]
    with pytest.raises(DavaeError, match=told):
        check_settings(load_recipe("debug", [*(f"autoencoder.optimizer.{o}" for o in overrides), *more]), "autoencoder")


def test_warm_ups_follow_the_steps_and_ones_that_do_not_end_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """A bundled recipe's share is in steps at once, so that a dry run shows them."""
    short = load_recipe("sd35-medium-1024", ["diffusion.loop.steps=2000"])
    assert short.diffusion.loss.detail_warmup_steps == 1000
    assert load_recipe("sd35-medium-1024").diffusion.loss.detail_warmup_steps == 10_000
    check_settings(short, "diffusion")
    assert not caplog.messages
    check_settings(load_recipe("tiny", ["diffusion.loss.detail_warmup_steps=10000"]), "diffusion")
    assert "the details hardly learn" in caplog.text
    assert "diffusion.loss.detail_warmup_steps=0.4" in caplog.text
