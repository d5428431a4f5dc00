"""Linear attention stays in float32 under mixed precision.

Linear attention sums ``v relu(k)^T`` over all positions and normalises by the sum of ``relu(k)``. These sums overflow
float16 on large images and keep fewer than three digits in bfloat16. diffusers converts its inputs to float32, but
under autocast ``torch.matmul`` converts them back; this module prevents that.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0, SanaMultiscaleLinearAttention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def keep_linear_attention_in_float32(module: nn.Module) -> int:
    """Make the linear attention inside a module (``AutoencoderDC``, SANA) multiply in float32 under autocast.

    Projections still run in half precision, and nothing changes without autocast. A second call has no further
    effect.

    Returns:
        The number of linear attention layers.
    """
    found = [part for part in module.modules() if _is_linear_attention(part)]
    for part in found:
        forward = part.forward
        if not (isinstance(forward, partial) and forward.func is _with_exact_products):
            part.forward = partial(_with_exact_products, forward)
    return len(found)


def _is_linear_attention(module: nn.Module) -> bool:
    if isinstance(module, SanaMultiscaleLinearAttention):
        return True
    return isinstance(getattr(module, "processor", None), SanaLinearAttnProcessor2_0)


def _with_exact_products(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with _ExactProducts():
        return forward(*args, **kwargs)


class _ExactProducts(TorchFunctionMode):
    """Makes ``torch.matmul`` compute in float32 under autocast; ``F.linear`` and convolutions are left alone."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.matmul or not torch.is_autocast_enabled(args[0].device.type):
            return func(*args, **kwargs)
        with torch.autocast(args[0].device.type, enabled=False):
            return func(*(a.float() for a in args), **kwargs)
