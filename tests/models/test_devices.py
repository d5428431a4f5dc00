"""Where an autoencoder computes: on the device of its weights, in their precision, and while they are offloaded.

A device that this machine lacks is played by torch's meta device: its tensors hold no numbers, and may not meet those
of another device here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from davae.models import AutoencoderDA
from tests.models.bases import make_base

DETAILS = (8, 16)
OTHER = torch.device("meta")


def make(name: str, levels: int = 1, **options: Any) -> AutoencoderDA:
    """With statistics that are not 0 and 1."""
    model = make_base(name)
    for details in DETAILS[:levels]:
        torch.manual_seed(details)
        model = AutoencoderDA.from_base(model, detail_channels=details, **options)
        model.register_to_config(detail_mean=[0.5] * details, detail_std=[2.0] * details)
    return model


def some_images(height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


def encode(model: AutoencoderDA, images: Tensor) -> Tensor:
    return model.encode(images).latent_dist.mode()


def latent_of(model: AutoencoderDA, images: Tensor) -> Tensor:
    """A latent that no part of the model has made."""
    rows, columns = (side // model.spatial_compression for side in images.shape[-2:])
    values = torch.linspace(-1, 1, 2 * model.layout.channels * rows * columns)
    return values.to(images).view(2, -1, rows, columns)


def by_tiles(model: AutoencoderDA, images: Tensor) -> Tensor:
    model.enable_tiling(images.shape[-2])  # two tiles, side by side
    made = model.decode(encode(model, images)).sample
    model.disable_tiling()
    return made


def by_slices(model: AutoencoderDA, images: Tensor) -> Tensor:
    model.enable_slicing()
    made = model.decode(latent_of(model, images)).sample
    model.disable_slicing()
    return made


def train_step(model: AutoencoderDA, images: Tensor) -> Tensor:
    posterior = model.train().encode_details(images)
    made = model.decode_structured(model.encode_base(images), posterior.mode())
    (made.float() - images).square().mean().backward()
    model.eval()
    return made


CALLS: dict[str, Callable[[AutoencoderDA, Tensor], Tensor]] = {
    "encode": encode,
    "sample": lambda model, images: model.encode(images).latent_dist.sample(),
    "decode": lambda model, images: model.decode(latent_of(model, images)).sample,
    "decode_base": lambda model, images: model.decode_base(latent_of(model, images)),
    "decode_level": lambda model, images: model.decode_level(latent_of(model, images), 1),
    "downsample": lambda model, images: model.downsample(images),
    "prefix": lambda model, images: model.encode_prefix(images),
    "own details": lambda model, images: model.encode_own_details(images).mean,
    "target": lambda model, images: model.alignment_target(model.encode_base(images)),
    "frame": lambda model, images: model.decode(encode(model, images[:, :, None])).sample,
    "forward": lambda model, images: model(images).sample,
    "tiles": by_tiles,
    "slices": by_slices,
}
CASES = [(name, 1) for name in ("kl", "dc", "tiny", "qwen", "qwen21")] + [("kl_lists", 2), ("flux2", 2)]
IDS = [f"{name}-{levels}" for name, levels in CASES]


# ---------------------------------------------------------------------- another device, another precision


_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class LikeAnAccelerator(TorchDispatchMode):
    """Operations refuse tensors of two devices, as they do on a GPU, and float64, which Apple's devices lack."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        devices = {tensor.device.type for tensor in given if tensor.ndim}
        if func not in _COPIES:
            assert len(devices) <= 1, f"{func} of tensors on {devices}"
        elif OTHER.type in devices and (kwargs or {}).get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif func is torch.ops.aten.copy_.default and args[0].device != OTHER:
            return args[0]
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device == OTHER:
                assert tensor.dtype != torch.float64, f"{func} makes float64"
        return made


@pytest.mark.parametrize(("name", "levels"), CASES, ids=IDS)
def test_everything_happens_on_the_weights_device(name: str, levels: int) -> None:
    dtype = torch.bfloat16
    model = make(name, levels).to(OTHER, dtype)
    for what in ("sample", "decode", "decode_base", "target", "tiles", "training"):
        call = CALLS.get(what, train_step)
        images = torch.empty(2, 3, 32, 48, device=OTHER, dtype=dtype)
        with torch.set_grad_enabled(what == "training"), LikeAnAccelerator():
            made = call(model, images)
        assert (made.device, made.dtype) == (OTHER, dtype), what


@pytest.mark.parametrize(("name", "levels"), CASES, ids=IDS)
def test_a_model_is_made_where_its_base_is(name: str, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_base(name).to(OTHER, torch.bfloat16)
    monkeypatch.setattr(Tensor, "is_meta", False)  # else these weights count as offloaded
    for details in DETAILS[:levels]:
        with LikeAnAccelerator():
            model = AutoencoderDA.from_base(model, detail_channels=details)
    for key, value in model.state_dict().items():
        assert value.device == OTHER, key
        assert value.dtype == torch.bfloat16 or not value.is_floating_point(), key


@pytest.mark.parametrize(("name", "levels"), CASES, ids=IDS)
@torch.no_grad()
def test_half_precision_computes(name: str, levels: int) -> None:
    """The kernels themselves, which fake tensors do not run, and agree with float32 up to rounding."""
    model, half = make(name, levels), make(name, levels).to(torch.bfloat16)
    for what, call in CALLS.items():
        if what == "sample":
            continue
        images = some_images()
        expected, made = call(model, images), call(half, images.bfloat16())
        assert made.dtype == torch.bfloat16, what
        assert (made.float() - expected).abs().mean() < (0.3 if what == "tiles" else 0.1) * expected.std(), what


# ---------------------------------------------------------------------- offloading


@pytest.mark.parametrize(("name", "levels"), CASES, ids=IDS)
@torch.no_grad()
def test_sequential_offloading_changes_nothing(name: str, levels: int) -> None:
    model, offloaded = make(name, levels), make(name, levels)
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for what, call in CALLS.items():
        if what not in ("sample", "forward"):  # forward itself has always had a hook
            images = some_images()
            assert torch.equal(call(offloaded, images), call(model, images)), what


@contextmanager
def groups_that_forget() -> Iterator[None]:
    """Group offloading in which weights that are not on the device are not numbers."""
    kept: dict[int, Tensor] = {}

    def tensors(group: ModuleGroup) -> list[Tensor]:
        inside = [t for m in group.modules for t in (*m.parameters(), *m.buffers())]
        return [t for t in (*inside, *group.parameters, *group.buffers) if t.is_floating_point()]

    def offload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            kept.setdefault(id(tensor), tensor.detach().clone())
            tensor.data.fill_(torch.nan)

    def onload(group: ModuleGroup) -> None:
        for tensor in tensors(group):
            tensor.data.copy_(kept[id(tensor)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModuleGroup, "offload_", offload)
        patch.setattr(ModuleGroup, "onload_", onload)
        yield


def keep_buffers(model: nn.Module) -> Callable[[], None]:
    """Batch norm's numbers are read, not called, and really stay on the CPU: they keep their values here."""
    values = {name: buffer.clone() for name, buffer in model.named_buffers() if "bn." in name}

    def restore() -> None:
        for name, value in values.items():
            model.get_buffer(name).copy_(value)

    return restore


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize(("name", "levels"), CASES, ids=IDS)
@torch.no_grad()
def test_group_offloading_brings_all_weights(name: str, levels: int, kind: str) -> None:
    model, offloaded = make(name, levels), make(name, levels)
    restore = keep_buffers(offloaded)
    with groups_that_forget():
        cpu = torch.device("cpu")
        apply_group_offloading(offloaded, cpu, cpu, offload_type=kind, num_blocks_per_group=1)
        restore()
        gone = [name for name, value in offloaded.named_parameters() if value.isnan().all()]
        assert len(gone) == len(list(offloaded.parameters()))
        for what, call in CALLS.items():
            if what not in ("sample", "forward"):
                images = some_images()
                assert torch.equal(call(offloaded, images), call(model, images)), what


@pytest.mark.parametrize("what", [what for what in CALLS if what not in ("downsample", "target")])
def test_model_offloading_brings_the_model(what: str) -> None:
    """Each public method brings the weights, as the first to be called."""
    model, _ = cpu_offload_with_hook(make("kl", 2), OTHER)
    assert model.device.type == "cpu"
    images = torch.empty(2, 3, 32, 48, device=OTHER)
    with torch.no_grad(), LikeAnAccelerator():
        assert CALLS[what](model, images).device == OTHER


@pytest.mark.parametrize(("name", "part"), [("dc", "detail_encoder"), ("qwen", "joint_decoder")])
@torch.no_grad()
def test_an_exported_network_takes_other_sizes(name: str, part: str) -> None:
    """As ONNX is made today; resizing keeps to the modes that it knows."""
    network = getattr(make(name).requires_grad_(False), part)
    assert not any(getattr(module, "mode", None) == "nearest-exact" for module in network.modules())
    channels = 3 if part == "detail_encoder" else 16
    sides = {axis: 4 * torch.export.Dim(letter, min=2, max=32) for axis, letter in ((2, "h"), (3, "w"))}
    exported = torch.export.export(network, (torch.rand(1, channels, 32, 32),), dynamic_shapes=(sides,), strict=False)
    other = torch.rand(1, channels, 24, 48)
    torch.testing.assert_close(exported.module()(other), network(other))
