"""Blocks of diffusers' image autoencoders that need less memory and time, with the same weights and results."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.utils import checkpoint


class InPlaceSiLU(nn.SiLU):
    """``x sigmoid(x)``, in place where nothing below learns; for inputs that are not used again."""

    def forward(self, input: Tensor) -> Tensor:
        """SiLU of a tensor of any shape."""
        return F.silu(input, inplace=not (torch.is_grad_enabled() and input.requires_grad))


class MemoryEfficientResnetBlock2D(ResnetBlock2D):
    """A residual block without time embedding or resampling that keeps little.

    Where gradients are off, or frozen blocks see nothing that learns, it works in place. Otherwise it keeps the inputs
    of its norms alone: norms and activations are computed again on the way back, convolutions are not. Results are the
    block's bit for bit.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, in, h, w]`` to ``[B, out, h, w]``."""
        if temb is not None or (self.training and self.dropout.p > 0):
            return super().forward(input_tensor, temb, *args, **kwargs)
        if _learns(self, input_tensor):
            x = _recomputed(self.norm1, self.conv1, input_tensor)  # [B, out, h, w]
            x = _recomputed(self.norm2, self.conv2, x)
            # Not diffusers' own, which makes the input contiguous and so leaves channels-last order.
            shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
            return (shortcut + x) / self.output_scale_factor if self.output_scale_factor != 1.0 else shortcut + x
        x = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))  # [B, out, h, w]
        x = F.silu(self.norm2(x), inplace=True)
        x = self.conv2(x)
        x += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x if self.output_scale_factor == 1.0 else x.div_(self.output_scale_factor)


def _learns(module: nn.Module, x: Tensor) -> bool:
    """Whether a call leads to a backward pass through ``module``."""
    return torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))


def _recomputed(norm: nn.Module, conv: nn.Module, x: Tensor) -> Tensor:
    """``conv(silu(norm(x)))``, keeping ``x`` alone; the way back stops recomputing before the convolution."""

    def activated(x: Tensor) -> Tensor:
        made: Tensor = conv(F.silu(norm(x)))
        return made

    if norm._forward_hooks:  # tiles of one image share statistics by hooks, which are gone on the way back
        return activated(x)
    made: Tensor = checkpoint.checkpoint(activated, x, use_reentrant=False, preserve_rng_state=False)
    return made


_PHASES = ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]], [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
"""``[phase, tap on the small grid, tap on the doubled grid]``: which taps of a 3-tap kernel see the same pixel."""


class PhasedUpsample2D(Upsample2D):
    """Nearest-neighbour doubling and a 3x3 convolution as four 2x2 convolutions of the small image, for training.

    Of the nine pixels that a 3x3 kernel sees after doubling, at most four differ. Adding up the weights that see the
    same one gives the same result up to rounding with 4/9 of the products, and the doubled image is never kept.
    Where nothing learns the layer is diffusers' own, bit for bit.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, in, h, w]`` to ``[B, out, 2h, 2w]``."""
        if output_size is not None or not _learns(self, hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        height, width = hidden_states.shape[-2:]
        phases = self.conv.weight.new_tensor(_PHASES)
        weight = torch.einsum("pay,qbx,ocyx->pqocab", phases, phases, self.conv.weight)  # [2, 2, out, in, 2, 2]
        x = F.pad(hidden_states, (1, 1, 1, 1))
        rows = []
        for p in range(2):
            row = [
                F.conv2d(x[..., p : p + height + 1, q : q + width + 1], weight[p, q], self.conv.bias) for q in range(2)
            ]
            last = row[0].is_contiguous(memory_format=torch.channels_last)
            h, w = (1, 2) if last else (2, 3)  # stacked in memory order, so that the result keeps it
            rows.append(torch.stack([y.permute(0, 2, 3, 1) if last else y for y in row], dim=w + 1))
        made = torch.stack(rows, dim=h + 1).flatten(w + 1, w + 2).flatten(h, h + 1)
        return made.permute(0, 3, 1, 2) if last else made


def with_memory_efficient_blocks(network: nn.Module) -> nn.Module:
    """Make diffusers' ``Encoder`` or ``Decoder`` use these blocks; it is changed in place and returned."""
    for module in network.modules():
        if _is_plain_block(module):
            module.__class__ = MemoryEfficientResnetBlock2D
        elif _is_plain_upsampling(module):
            module.__class__ = PhasedUpsample2D
    if type(getattr(network, "conv_act", None)) is nn.SiLU:  # after a norm, whose output nobody else reads
        network.conv_act = InPlaceSiLU()
    return network


def with_plain_blocks(network: nn.Module) -> nn.Module:
    """Undo :func:`with_memory_efficient_blocks`, in place."""
    plain = {MemoryEfficientResnetBlock2D: ResnetBlock2D, PhasedUpsample2D: Upsample2D, InPlaceSiLU: nn.SiLU}
    for module in network.modules():
        module.__class__ = plain.get(type(module), type(module))
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


def _is_plain_upsampling(module: nn.Module) -> bool:
    return (
        type(module) is Upsample2D
        and module.norm is None
        and module.interpolate
        and type(getattr(module, "conv", None)) is nn.Conv2d
        and module.conv.kernel_size == (3, 3)
        and module.conv.padding == (1, 1)
    )
