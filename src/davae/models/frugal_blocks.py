"""Residual blocks that keep less at a time while gradients are off.

At full resolution a few of a decoder's tensors are most of its memory. Diffusers' block writes its activations, its sum
and the division by a scale of 1 beside their inputs, which nobody reads again; here they take their place. The numbers
are the same, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class FrugalSiLU(nn.SiLU):
    """``x sigmoid(x)``, in place while gradients are off. For inputs that nobody reads afterwards."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return F.silu(input, inplace=not torch.is_grad_enabled())


class FrugalResnetBlock2D(ResnetBlock2D):
    """A residual block of a KL autoencoder: no time, no change of resolution."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, in, h, w]`` to ``[B, out, h, w]``."""
        if torch.is_grad_enabled() or temb is not None:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))  # [B, out, h, w]
        x = F.silu(self.norm2(x), inplace=True)
        x = self.conv2(self.dropout(x))
        x += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x if self.output_scale_factor == 1.0 else x.div_(self.output_scale_factor)


def with_frugal_blocks(network: nn.Module) -> nn.Module:
    """Let diffusers' ``Encoder`` or ``Decoder`` use these blocks; changed in place and returned."""
    for module in network.modules():
        if _is_plain_block(module):
            module.__class__ = FrugalResnetBlock2D
    if type(getattr(network, "conv_act", None)) is nn.SiLU:  # after a norm, whose output nobody else reads
        network.conv_act = FrugalSiLU()
    return network


def _is_plain_block(module: nn.Module) -> bool:
    return (
        type(module) is ResnetBlock2D
        and module.time_emb_proj is None
        and module.upsample is None
        and module.downsample is None
        and type(module.nonlinearity) is nn.SiLU
        and isinstance(module.norm1, nn.GroupNorm)
        and isinstance(module.norm2, nn.GroupNorm)
    )
