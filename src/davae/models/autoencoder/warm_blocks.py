"""Initial values for the new blocks with which the autoencoder starts from a sensible image.

Random blocks would make the copied encoder and decoder useless for the first steps. In the base, a single convolution
stands in place of each block, and that convolution fits into the new block:

* down: the learned branch computes the base latent of the image at *full* resolution, unshuffled. Its grouped
  mean is close to the base latent of the reduced image, so the alignment loss starts small.
* up: ``conv + shortcut`` of :class:`ResidualUpsample` together compute the base decoder's first features, from the
  full-resolution latent in the details, or from the enlarged base latent if the details have another size.

With zero details the autoencoder starts as a blurred enlargement of the base's reconstruction. With ``D = s^2 C`` the
learned branches alone are the base VAE at full resolution; the down block's shortcut adds means of its features to the
details, so the initial reconstruction is worse than the base VAE's.

This affects initialisation only and is not recorded in the config.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.latents import LatentLayout, grouped_mean
from davae.models.autoencoder.residual_sampling import ResidualDownsample, ResidualUpsample
from davae.models.base_adapters.adapter import Convolution

START_LOGVAR = -6.0  # standard deviation 0.05: samples start close to their mean


@torch.no_grad()
def warm_up_block(block: ResidualUpsample, stem: Convolution, layout: LatentLayout, *, detail_first: bool) -> None:
    """Make the block compute ``stem`` of an estimate of the full-resolution base latent.

    With ``D = s^2 C`` the details are that latent unshuffled, and the mean of each group is replaced by the base
    latent: the estimate at sub-pixel k is ``z + z_d[k] - mean(z_d)``, which is ``z`` if the details are zero.
    With any other D the estimate is ``z`` at every sub-pixel.

    Args:
        block: changed in place.
        stem: base channels to first features, ``[F, C, 3, 3]``.
        layout: channel counts.
        detail_first: the details come first in the block's input.
    """
    cells, base, details = block.factor**2, layout.base_channels, layout.detail_channels
    estimate = torch.zeros(base * cells, layout.channels)  # [C s^2, C + D]
    estimate[:, :base] = torch.eye(base).repeat_interleave(cells, dim=0)
    if details == base * cells:
        centred = torch.eye(cells) - 1 / cells
        estimate[:, base:] = torch.block_diag(*[centred] * base)
    if detail_first:
        estimate = estimate.roll(details, dims=1)
    shuffled = before_shuffle(stem.weight.float().cpu(), block.factor)  # [F s^2, C s^2, 3, 3]
    weight = torch.einsum("ochw,ci->oihw", shuffled, estimate)
    set_up_block(block, Convolution(weight, stem.bias.repeat_interleave(cells)))


@torch.no_grad()
def warm_nested_up_block(
    block: ResidualUpsample,
    below: Convolution,
    stem: Convolution | None,
    layout: LatentLayout,
    factor_below: int,
    *,
    detail_first: bool,
) -> None:
    """Make the up block of a further level compute the first features of the level below, each repeated.

    The model then starts as an enlargement of the trained level below. With ``D = s^2 C`` the new
    details are the base latent at full resolution, unshuffled; what they add to the level below, their
    difference from the mean over each repeated cell, passes through the base's stem and is added.

    Args:
        block: changed in place.
        below: the block below up to its shuffle, ``[F t^2, C + D_below, 3, 3]``.
        stem: base channels to first features, ``[F, C, 3, 3]``; None if that is not a single convolution.
        layout: channels below this level, and those it adds.
        factor_below: ``t``, the factor of the block below.
        detail_first: this level's details come first in the block's input.
    """
    repeats, cells = block.factor // factor_below, block.factor**2
    base, details = layout.base_channels, layout.detail_channels
    weight = torch.zeros(block.shortcut_channels, layout.channels, 3, 3)
    weight[:, :base] = _repeat_subpixels(below.weight.cpu(), factor_below, repeats)
    if stem is not None and details == stem.weight.shape[1] * cells:
        mean = torch.eye(factor_below).repeat_interleave(repeats, dim=0)  # [s, t]: row -> cell below
        mean = mean @ mean.T / repeats
        centred = torch.eye(cells) - torch.kron(mean, mean)  # [s^2, s^2]
        estimate = torch.block_diag(*[centred] * stem.weight.shape[1])  # [C s^2, D]
        shuffled = before_shuffle(stem.weight.float().cpu(), block.factor)
        weight[:, base:] = torch.einsum("ochw,ci->oihw", shuffled, estimate)
    if detail_first:
        weight = weight.roll(details, dims=1)
    set_up_block(block, Convolution(weight, _repeat_subpixels(below.bias, factor_below, repeats)))


def _repeat_subpixels(channels: Tensor, factor: int, repeats: int) -> Tensor:
    """Channels before a shuffle by ``f``, ``[F f^2, ...]``, to those before one by ``f r`` that repeats each pixel."""
    grid = channels.unflatten(0, (-1, factor, factor))
    grid = grid.repeat_interleave(repeats, dim=1).repeat_interleave(repeats, dim=2)
    return grid.flatten(0, 2)


def set_up_block(block: ResidualUpsample, wanted: Convolution) -> None:
    """Set the learned branch so that the whole block computes ``wanted`` before its shuffle."""
    weight = wanted.weight.clone()
    if block.shortcut and block.shortcut_proj is None:  # subtract what the shortcut will add
        weight -= _shortcut(block).to(weight)
    block.conv.weight.copy_(weight)
    assert block.conv.bias is not None
    block.conv.bias.copy_(wanted.bias)


@torch.no_grad()
def folded_up_block(block: ResidualUpsample, layout: LatentLayout, *, detail_first: bool) -> Convolution:
    """The block up to its shuffle as one convolution, ``[F f^2, C + D, 3, 3]``, base channels first."""
    assert block.conv.bias is not None
    weight = block.conv.weight.detach().float().clone()
    if block.shortcut_proj is not None:
        weight[:, :, 1, 1] += block.shortcut_proj.weight[:, :, 0, 0]
    elif block.shortcut:
        weight += _shortcut(block).to(weight)
    if detail_first:
        weight = weight.roll(-layout.detail_channels, dims=1)
    return Convolution(weight, block.conv.bias.detach().float())


def _shortcut(block: ResidualUpsample) -> Tensor:
    """The shortcut that repeats channels as a 3x3 convolution, ``[F f^2, in, 3, 3]``."""
    weight = torch.zeros(block.shortcut_channels, block.conv.in_channels, 3, 3)
    outputs = torch.arange(block.shortcut_channels)
    weight[outputs, outputs // (block.shortcut_channels // block.conv.in_channels), 1, 1] = 1.0
    return weight


def before_shuffle(weight: Tensor, factor: int) -> Tensor:
    """The 3x3 convolution on the unshuffled grid that exactly equals ``weight`` on the shuffled one.

    ``pixel_shuffle(conv(x, result)) = conv(pixel_shuffle(x), weight)``: the neighbour of sub-pixel ``a`` at offset
    ``d`` is sub-pixel ``(a + d) mod f`` of the cell ``(a + d) // f``, which is at most one cell away.

    Args:
        weight: ``[out, in, 3, 3]``.
        factor: ``f``.

    Returns:
        ``[out f^2, in f^2, 3, 3]``.
    """
    out_channels, in_channels = weight.shape[:2]
    f = factor
    result = weight.new_zeros(out_channels, f, f, in_channels, f, f, 3, 3)
    for row, column, dy, dx in product(range(f), range(f), (-1, 0, 1), (-1, 0, 1)):
        y, x = row + dy, column + dx
        result[:, row, column, :, y % f, x % f, y // f + 1, x // f + 1] = weight[:, :, dy + 1, dx + 1]
    return result.reshape(out_channels * f * f, in_channels * f * f, 3, 3)


@torch.no_grad()
def warm_down_block(block: ResidualDownsample, head: Convolution, layout: LatentLayout) -> None:
    """Make the learned branch give the full-resolution base latent as mean, with a small variance.

    Every row of the convolution makes ``s^2`` consecutive latent channels. With ``D = s^2 C`` each row is
    one base channel; otherwise rows are the mixtures whose grouped mean is nearest to the base channels
    in least squares.

    Args:
        block: last features to mean and log-variance, ``2 D`` channels; changed in place.
        head: last features to the base channels, ``[C, F, 3, 3]``.
        layout: channel counts.
    """
    cells, details = block.factor**2, layout.detail_channels
    rows = block.conv.out_channels
    means = details // cells  # rows that make mean channels only
    first_logvar = -(-details // cells)
    weight = torch.zeros_like(block.conv.weight, dtype=torch.float32)
    bias = torch.zeros(rows, device=weight.device)
    if means:
        spread = torch.eye(rows)[:, :means].repeat_interleave(cells, dim=0)[:details]  # [D, means]: row -> channels
        grouped = grouped_mean(spread.T[:, :, None, None], layout.base_channels)[:, :, 0, 0].T  # [C, means]
        mixture = torch.linalg.pinv(grouped).to(weight)  # [means, C]
        mixed = head.then(mixture, torch.zeros_like(mixture[:, 0]))
        weight[:means], bias[:means] = mixed.weight, mixed.bias
    bias[first_logvar:] = START_LOGVAR
    block.conv.weight.copy_(weight)
    assert block.conv.bias is not None
    block.conv.bias.copy_(bias)


@torch.no_grad()
def start_blocks_from_base(model: Any) -> None:
    """Initialise the down block and the up block of an :class:`davae.AutoencoderDA`.

    Where the base's layers at the latent are not single convolutions, torch's random initialisation stays.
    """
    base_channels, details = model.layout.base_channels, model.own_layout.detail_channels
    shift, scale = (values[:base_channels] for values in model.base_affine(model.device))
    head = model.adapter.encoder_head(model.base)
    if head is not None:
        head = head.then(torch.diag(scale), -shift * scale)
        warm_down_block(model.down, head, LatentLayout(base_channels, details))
    stem = model.adapter.network_adapter(model.base).decoder_stem(model.base_vae)
    if stem is not None:
        stem = stem.after(torch.diag(1.0 / scale), shift)
    detail_first = is_detail_first(model)
    if model.below is not None:
        start = _as_seen_above(model.below, *model.base_affine(model.device))
        warm_nested_up_block(model.up, start, stem, model.own_layout, model.below.scale, detail_first=detail_first)
    elif stem is not None:
        warm_up_block(model.up, stem, model.own_layout, detail_first=detail_first)


def _as_seen_above(model: Any, shift: Tensor, scale: Tensor) -> Convolution:
    """The model's up block up to its shuffle, for latents ``(raw - shift) * scale`` of all its channels."""
    convolution = folded_up_block(model.up, model.own_layout, detail_first=is_detail_first(model))
    details = model.own_layout.detail_channels  # its decoder takes its own details raw
    own_shift, own_scale = model.base_affine(shift.device)
    own_shift, own_scale = F.pad(own_shift, (0, details)), F.pad(own_scale, (0, details), value=1.0)
    return convolution.after(torch.diag(own_scale / scale), (shift - own_shift) * own_scale)


def is_detail_first(model: Any) -> bool:
    """Whether the details come first in the input of the model's up block."""
    return bool(model.config.decoder_channel_order == "detail_first")
