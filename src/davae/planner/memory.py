"""The cost of a computation, measured with shapes only: operations, and peak memory.

Every operator that torch dispatches is counted. The bytes of a storage count from the operator that creates it until
its last reference is gone, as in a caching allocator without rounding and fragmentation.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Cost:
    """Attributes: floating-point operations; peak of the bytes allocated in addition to what existed before."""

    flops: int
    peak_bytes: int


def cost_of(
    fn: Callable[[], object],
    *,
    given: Iterable[Tensor] = (),
    watch: bool = True,
    autocast: bool = False,
    cpu: bool = False,
) -> Cost:
    """Operations and peak memory of one call, forward or forward and backward.

    Attention is counted as a fused GPU kernel: its score matrix is never stored, and its backward computes
    the scores again.

    Args:
        fn: what to measure; its tensors are on the meta device.
        given: tensors that exist before, such as weights, and do not count.
        watch: also track memory; without it only operations are counted, several times faster.
        autocast: 16-bit mixed precision. Gradient checkpointing must be told separately (:func:`checkpointing`).
        cpu: by a CPU's rules: its autocast leaves norms and softmax in 16 bit, and while a convolution runs, its input
            and output exist twice, the second time in oneDNN's order.
    """
    meter = Meter(given, watch)
    # Blocks that recompute by themselves need these kernels then, too.
    with (
        patch.object(torch.utils.checkpoint, "checkpoint", checkpointing(autocast, cpu)),
        meter,
        Kernels(autocast, cpu),
    ):
        fn()
    return Cost(meter.flops, meter.peak_bytes)


class Meter(TorchDispatchMode):
    """Counts operations, by torch's own formulas, and the bytes of all live tensors, each storage once.

    Torch's ``FlopCounterMode`` uses module hooks that keep activations alive, so it cannot be used while
    memory is tracked.

    Args:
        given: tensors that exist before and do not count.
        watch: track memory.
    """

    def __init__(self, given: Iterable[Tensor] = (), watch: bool = True) -> None:
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self.watch = watch
        self._given = [tensor.untyped_storage() for tensor in given]  # kept: a storage is known by identity
        self._known = weakref.WeakValueDictionary({s._cdata: s for s in self._given})

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        if self.watch:
            tree_map_only(Tensor, self._see, out)
        return out

    def leave_out(self, tensor: Tensor) -> None:
        """Count a tensor no more."""
        self._given.append(tensor.untyped_storage())
        self._forget(self._given[-1].nbytes())

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known[storage._cdata] = storage
        size = storage.nbytes()
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live_bytes -= size


class ShapesOnly(TorchFunctionMode):
    """Skips drawing initial values, which takes most of the time of building a large model on the meta device."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return kwargs.get("tensor", *args[:1]) if func in _DRAWN else func(*args, **kwargs)


_DRAWN = {Tensor.uniform_, Tensor.normal_, nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_}
_NARROW = {F.linear, torch.conv2d, torch.matmul, torch.bmm, torch.mm, torch.addmm, torch.baddbmm, torch.einsum}
_NARROW |= {Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm}
_WIDE = {F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax}


class Kernels(TorchFunctionMode):
    """Makes the meta device compute shapes as a GPU does, or a CPU.

    Attention goes to the fused kernels, which keep no score matrix. With ``autocast``, operators run in 16 bit or
    float32 as under the device's autocast; trained weights are cast once.
    """

    def __init__(self, autocast: bool = False, cpu: bool = False) -> None:
        super().__init__()
        self.autocast, self.cpu, self.wide = autocast, cpu, frozenset() if cpu else _WIDE
        self._cast_weights: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        attention = func is F.scaled_dot_product_attention
        if self.autocast and (attention or func in _NARROW):
            args, kwargs = tree_map_only(Tensor, self._narrow, (args, kwargs))
        elif self.autocast and func in self.wide:
            args, kwargs = tree_map_only(Tensor, _wide, (args, kwargs))
        if self.cpu and func is torch.conv2d:
            reordered = [torch.empty_like(args[0])]
            out = func(*args, **kwargs)
            reordered.append(torch.empty_like(out))
            return out
        return _fused_attention(*args, **kwargs) if attention else func(*args, **kwargs)

    def _narrow(self, tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        if not (tensor.is_leaf and tensor.requires_grad):
            return tensor.to(torch.bfloat16)
        if id(tensor) not in self._cast_weights:
            self._cast_weights[id(tensor)] = tensor.to(torch.bfloat16)
        return self._cast_weights[id(tensor)]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, 0.0, is_causal, False, scale=scale)[0]
    bias = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    bias = torch.zeros_like(bias, dtype=query.dtype) if bias.dtype == torch.bool else bias.to(query.dtype)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, torch.is_grad_enabled(), 0.0, is_causal, scale=scale)[0]


def checkpointing(autocast: bool, cpu: bool = False) -> Callable[..., Any]:
    """The function for ``enable_gradient_checkpointing`` of a model on the meta device."""

    def checkpointed(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        # Recomputation runs in the backward pass, where function modes are off: enable this one again.
        return checkpoint(
            function,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), Kernels(autocast, cpu)),
        )

    return checkpointed


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Free each gradient as soon as it is complete, so that the peak consists of activations only."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in parameters:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


def built_without_weights(build: Callable[[], M]) -> tuple[M, int]:
    """A model, and the peak memory while it is made if its parameters take none: its buffers, and computing them.

    Args:
        build: makes the model on the meta device.
    """
    meter, register = Meter(), nn.Module.register_parameter

    def without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            meter.leave_out(parameter)

    with patch.object(nn.Module, "register_parameter", without_memory), meter:
        model = build()
    return model, meter.peak_bytes


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Size of tensors, each once."""
    return sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())


def count_flops(fn: Callable[[], object], *, fake: bool = False) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions in one call.

    A multiply-add counts as two. Element-wise work (normalisation, activations) is not counted, as is usual.
    Attention counts both of its matrix products, ``4 B H N M d``, on every device: the fused CPU kernel
    is unknown to torch's counter, so the plain form is dispatched while counting.

    Args:
        fn: what to count; called once, without gradients.
        fake: use fake tensors, so that a model of any size is counted quickly and
            without memory. Not for a function that reads values (``.item()``, schedulers, pipelines) or
            that keeps tensors from one call to the next, since it would keep fake ones.

    Returns:
        The count; divide by the batch size for one image.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if fake:
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        counter = stack.enter_context(FlopCounterMode(display=False))
        fn()
    return int(counter.get_total_flops())
