"""Sharding, on a process group of one: names of blocks, whole models, and what is refused."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import AutoencoderDC, AutoencoderKL
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import davae
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.models import PatchDiscriminator
from davae.recipes.loop import LoopSettings, OptimizerSettings
from davae.training.engine import fsdp as sharding
from davae.training.engine.fsdp import (
    begin_accelerator,
    block_classes,
    leave_constants,
    replicate,
    synchronise_norms,
    unshard_for_good,
    unsharded,
)
from davae.training.engine.tensors import (
    clip_gradients,
    full_state_on_cpu,
    gradient_norms,
    like,
    mask_gradients,
    module_tensors,
    spread_masks,
)
from davae.training.engine.trainer import prepare
from davae.training.stage import TrainedModule

CONFIGS = sorted((Path(davae.__file__).parent / "configs" / "accelerate").glob("*.yaml"))
SHARDED = [c for c in CONFIGS if load_config_from_file(str(c)).distributed_type == DistributedType.FSDP]


class _Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen, self.learns = nn.Linear(4, 4), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return x + self.learns(self.frozen(x).tanh())


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def outside_of_forward(self, x):
        return self.head(x)


@pytest.fixture
def group(tmp_path):
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _pair() -> tuple[_Model, _Model]:
    torch.manual_seed(0)
    plain, sharded = _Model(), _Model()
    sharded.load_state_dict(plain.state_dict())
    for block in sharded.blocks:
        fully_shard(block)
    return plain, fully_shard(sharded)


def test_a_whole_model_answers_to_any_method_and_trains_on_afterwards(group):
    plain, sharded = _pair()
    x = torch.randn(3, 4)
    for trained_before in (False, True):
        with unsharded(sharded), torch.no_grad():
            assert not any(isinstance(p, DTensor) for p in sharded.parameters())
            torch.testing.assert_close(sharded.outside_of_forward(x), plain.outside_of_forward(x))
            torch.testing.assert_close(sharded(x), plain(x))
            assert not any(isinstance(p, DTensor) for p in sharded.parameters())  # also after a forward
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        if not trained_before:
            sharded(x).square().sum().backward()
            plain(x).square().sum().backward()
    torch.testing.assert_close(sharded.head.weight.grad.full_tensor(), plain.head.weight.grad)


def test_what_frees_its_weights_after_forward_does_so_again(group):
    _, sharded = _pair()
    with unsharded(sharded):
        pass
    sharded(torch.randn(3, 4))
    assert isinstance(sharded.blocks[0].learns.weight, DTensor)
    assert not isinstance(sharded.head.weight, DTensor)  # the root keeps them until backward


def test_a_dissolved_model_is_an_ordinary_one(group):
    plain, sharded = _pair()
    sharded(torch.randn(3, 4))
    unshard_for_good(sharded)
    assert type(sharded) is _Model
    assert not any(isinstance(m, FSDPModule) for m in sharded.modules())
    assert {n: p.requires_grad for n, p in sharded.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }
    sharded.to(torch.float64)  # a sharded model would be sharded again here
    torch.testing.assert_close(sharded.state_dict(), plain.double().state_dict())
    fully_shard(sharded)  # as a part of the next stage may be
    sharded(torch.randn(3, 4, dtype=torch.float64)).sum().backward()


def test_norms_clipping_and_masks_of_sharded_gradients(group):
    plain, sharded = _pair()
    x = torch.randn(3, 4)
    for model in (plain, sharded):
        model(x).square().sum().backward()
    own, other = ([p for p in m.parameters() if p.requires_grad] for m in (plain, sharded))
    torch.testing.assert_close(gradient_norms(other), gradient_norms(own))
    torch.testing.assert_close(clip_gradients(other, 0.1), clip_gradients(own, 0.1))
    mask = torch.tensor([[True, False, False, True]])
    mask_gradients(sharded, spread_masks(sharded, {"head.weight": mask}))
    expected = torch.where(mask, plain.head.weight.grad, 0.0)
    torch.testing.assert_close(sharded.head.weight.grad.full_tensor(), expected)
    sharded.blocks[1].learns.weight.grad.to_local()[0, 0] = torch.nan
    assert (~gradient_norms(other).isfinite()).sum() == 1


def test_tensors_go_to_files_and_back(group):
    plain, sharded = _pair()
    found = full_state_on_cpu(dict(sharded.named_parameters()), keep=True)
    assert found.keys() == dict(plain.named_parameters()).keys()
    assert full_state_on_cpu(dict(sharded.named_parameters()), keep=False) == {}
    for name, parameter in sharded.named_parameters():
        assert torch.equal(like(found[name], parameter).full_tensor(), parameter.full_tensor())


def test_the_repeated_blocks_of_models():
    base = debug_base()
    assert block_classes(base.transformer) == ["LightningDiTBlock"]
    assert block_classes(nn.ModuleList([base.transformer])) == ["LightningDiTBlock"]  # a model inside an objective
    kl = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, layers_per_block=1)
    assert block_classes(kl) == ["ResnetBlock2D"]  # it names others too, which it does not have
    assert block_classes(_Model()) == ["_Block"]  # names none: what a ModuleList repeats
    assert AutoencoderDC._no_split_modules is None


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.stem)
def test_accelerate_reads_every_configuration(config):
    read = load_config_from_file(str(config))
    assert read.mixed_precision == "no"  # the recipe's
    assert read.num_processes % read.num_machines == 0


def _launched(config: Path) -> dict[str, str]:
    """What ``accelerate launch --config_file`` puts into the environment of the processes."""
    asked = ["--config_file", str(config), "--main_process_port", "29511", "-m", "davae"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(asked))
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("config", SHARDED, ids=lambda c: c.stem)
def test_sharding_configurations_are_understood(config, monkeypatch):
    for name, value in _launched(config).items():
        monkeypatch.setenv(name, value)
    plugin = sharding._plugin()
    assert plugin.fsdp_version == 2
    assert plugin.activation_checkpointing
    assert plugin.reshard_after_forward == (config.stem != "fsdp2-zero2")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FSDP_VERSION", "1", "set fsdp_version: 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading"),
        ("FSDP_IGNORED_MODULES", "head", "fsdp_ignored_modules"),
    ],
)
def test_what_is_not_supported_is_refused_before_anything_starts(name, value, message, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(DavaeError, match=message):
        begin_accelerator(cpu=True)


def test_float16_is_refused_with_sharding(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(DavaeError, match=r"loop\.precision=bf16"):
        begin_accelerator(cpu=True, mixed_precision="fp16")


def test_a_second_training_in_one_process_finds_fsdp_again(monkeypatch):
    before = dict(PartialState._shared_state)
    try:
        PartialState._shared_state.update(distributed_type=DistributedType.FSDP, device=torch.device("cpu"))
        sharding._forget_the_training_before()
        assert PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU
    finally:
        PartialState._shared_state.clear()
        PartialState._shared_state.update(before)
        AcceleratorState._reset_state()


def test_ddp_sends_running_statistics_and_no_constants(group):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    model.register_buffer("table", torch.ones(3))
    leave_constants(model)
    sent = {id(buffer) for buffer in replicate(model, torch.device("cpu")).modules_buffers}
    assert sent == {id(buffer) for buffer in model[1].buffers()}


def _norms(module: nn.Module) -> list[type]:
    return [type(m) for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_batch_norms_that_learn_are_synchronised_and_keep_their_names():
    model = PatchDiscriminator(filters=4, layers=2)
    learns, frozen = (m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    before = {name: value.clone() for name, value in module_tensors(model).items()}
    images = torch.randn(2, 3, 32, 32)
    expected = model.eval()(images)
    learns.train()
    synchronise_norms(model)
    assert _norms(model) == [nn.SyncBatchNorm, nn.BatchNorm2d]
    assert learns in model.main  # whoever holds a layer holds the one that learns
    assert frozen in model.main
    assert module_tensors(model).keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module_tensors(model).items())
    assert torch.equal(model.eval()(images), expected)
    PatchDiscriminator(filters=4, layers=2).load_state_dict(model.state_dict())


class _Elsewhere(nn.Sequential):
    """Says that it is where it is asked to be."""

    def to(self, *_, **__):
        return self


class _Processes:
    """As many processes as a launcher would start on a kind of device."""

    distributed_type = DistributedType.NO

    def __init__(self, count: int, device: str) -> None:
        self.num_processes, self.device = count, torch.device(device)

    def prepare(self, *parts):
        return parts


@pytest.mark.parametrize(
    ("count", "device", "kind"),
    [
        (2, "cuda", nn.SyncBatchNorm),
        (1, "cuda", nn.BatchNorm2d),
        (2, "cpu", nn.BatchNorm2d),
    ],
)
def test_only_several_cuda_devices_synchronise_norms(count, device, kind):
    module = _Elsewhere(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    trained = TrainedModule("model", module, OptimizerSettings(learning_rate=0.1))
    loop = LoopSettings(steps=1, batch_size=1, report_to=[], channels_last=False)
    prepare(_Processes(count, device), loop, trained, is_model=True)
    assert _norms(module) == [kind]
