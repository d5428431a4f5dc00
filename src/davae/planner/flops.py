"""Counting floating point operations of any function by watching what torch dispatches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(fn: Callable[[], object], *, fake: bool = False) -> int:
    """Floating point operations of the matrix products, convolutions and attentions in one call.

    A multiply-add counts as two. Element-wise work (normalisation, activations) is not counted, as is usual.
    Attention counts both of its matrix products, ``4 B H N M d``, on every device: the fused CPU kernel
    is unknown to torch's counter, so the plain form is dispatched while counting.

    Args:
        fn: what to count; called once, without gradients.
        fake: let shapes flow instead of numbers, so that a model of any size is counted in moments and
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
