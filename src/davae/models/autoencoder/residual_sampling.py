"""Residual space-to-channel and channel-to-space blocks (DC-AE, arXiv 2410.10733, Sec. 3.2)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.choices import DownMethod
from davae.errors import DavaeError


class ResidualDownsample(nn.Module):
    """From ``[B, in, H, W]`` to ``[B, out, H / f, W / f]``: a learned branch plus a shortcut.

    ``unshuffle(conv(x)) + mean_groups(unshuffle(x))``, with a 3x3 convolution to ``out / f^2`` channels. The
    shortcut averages groups of ``in f^2 / out`` consecutive channels if that is an integer; otherwise it is a
    bias-free 1x1 convolution of ``unshuffle(x)``, initialised to zero.

    Args:
        in_channels, out_channels: channel counts.
        factor: ``f``.
        method: ``"unshuffle"`` as above, or ``"stride"``: a convolution of stride ``f`` in the learned branch.
        kernel_size: of the convolution. With ``"stride"`` and ``f + 2``, an output sees its ``f x f`` features and the
            ring around them, which is all that the other method's sees.
        shortcut: whether there is a shortcut.

    Raises:
        DavaeError: ``out`` is not a multiple of ``f^2`` (method ``unshuffle``).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int,
        *,
        method: DownMethod = "unshuffle",
        kernel_size: int = 3,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels, self.factor, self.method, self.shortcut = out_channels, factor, method, shortcut
        cells = factor * factor
        if method == "unshuffle" and out_channels % cells:
            raise DavaeError(f"{out_channels} output channels are not a multiple of {factor}² = {cells}")
        width = out_channels // cells if method == "unshuffle" else out_channels
        stride = 1 if method == "unshuffle" else factor
        self.conv = nn.Conv2d(in_channels, width, kernel_size=kernel_size, stride=stride, padding=1)
        self.shortcut_proj: nn.Conv2d | None = None
        if shortcut and in_channels * cells % out_channels:
            self.shortcut_proj = _zero_projection(in_channels * cells, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` to ``[B, out, H / f, W / f]``; sides must be multiples of ``f``."""
        y = self.conv(x)
        if self.method == "unshuffle":
            y = F.pixel_unshuffle(y, self.factor)  # [B, out, H/f, W/f]
        if not self.shortcut:
            return y
        x = F.pixel_unshuffle(x, self.factor)  # [B, in f^2, H/f, W/f]
        if self.shortcut_proj is not None:
            return y + self.shortcut_proj(x)
        return y + x.unflatten(1, (self.out_channels, -1)).mean(dim=2)


def down_block(features: int, detail_channels: int, factor: int, method: DownMethod) -> ResidualDownsample:
    """The down block of an autoencoder: last features to mean and log-variance of the details, ``2 D`` channels."""
    if method == "unshuffle":
        return ResidualDownsample(features, 2 * detail_channels, factor)
    return ResidualDownsample(
        features, 2 * detail_channels, factor, method="stride", kernel_size=factor + 2, shortcut=False
    )


class ResidualUpsample(nn.Module):
    """From ``[B, in, h, w]`` to ``[B, out, f h, f w]``: a learned branch plus a shortcut.

    ``shuffle(conv(x)) + shuffle(repeat(x))``, with a 3x3 convolution to ``out f^2`` channels. The shortcut
    repeats each channel ``out f^2 / in`` times in a row if that is an integer; otherwise it is a bias-free 1x1
    convolution initialised to zero. It maps channels by position, so their order matters.

    Args:
        in_channels, out_channels: channel counts.
        factor: ``f``.
        method: ``"shuffle"`` as above, or ``"nearest"``: nearest-neighbour resize, then a 3x3 convolution.
        shortcut: whether there is a shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int,
        *,
        method: Literal["shuffle", "nearest"] = "shuffle",
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.factor, self.method, self.shortcut = factor, method, shortcut
        self.in_channels = in_channels
        self.shortcut_channels = out_channels * factor * factor
        width = self.shortcut_channels if method == "shuffle" else out_channels
        self.conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.shortcut_proj: nn.Conv2d | None = None
        if shortcut and self.shortcut_channels % in_channels:
            self.shortcut_proj = _zero_projection(in_channels, self.shortcut_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, h, w]`` to ``[B, out, f h, f w]``."""
        if self.method == "shuffle":
            y = F.pixel_shuffle(self.conv(x), self.factor)  # [B, out, fh, fw]
        else:
            y = self.conv(F.interpolate(x, scale_factor=float(self.factor), mode="nearest"))
        if not self.shortcut:
            return y
        if self.shortcut_proj is not None:
            x = self.shortcut_proj(x)
        else:  # expand and flatten: exporters do not support repeat_interleave
            repeats = self.shortcut_channels // x.shape[1]
            x = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)  # [B, out f^2, h, w]
        return y + F.pixel_shuffle(x, self.factor)

    @torch.no_grad()
    def columns(self, kept: slice) -> Tensor:
        """Weight ``[out f^2, n, 3, 3]`` of convolution and shortcut together; of the method ``shuffle``.

        Args:
            kept: the input channels, ``n``.
        """
        weight = self.conv.weight.detach().float().clone()
        if self.shortcut_proj is not None:
            weight[:, :, 1, 1] += self.shortcut_proj.weight.float()[:, :, 0, 0]
        elif self.shortcut:
            repeats = self.shortcut_channels // self.in_channels
            weight[:, :, 1, 1] += torch.eye(self.in_channels, device=weight.device).repeat_interleave(repeats, dim=0)
        return weight[:, kept]


def _zero_projection(in_channels: int, out_channels: int) -> nn.Conv2d:
    projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
    nn.init.zeros_(projection.weight)
    return projection
