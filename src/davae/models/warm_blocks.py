"""Start values for the new blocks that let the autoencoder begin with a sensible image.

Random blocks make the copied encoder and decoder useless for the first steps. Their place in the base was
held by one
convolution each, and that convolution fits into the new blocks:

* up: ``conv + shortcut`` of :class:`ResidualUpsample` together give every sub-pixel the first features that
  the base decoder would have at that latent position. The start is the base's reconstruction from features
  enlarged by nearest neighbour, whatever the details are.
* down: the learned branch gives the base latent of the image at *full* resolution, unshuffled. Its grouped
  mean is close to the base latent of the smaller image, so that alignment starts nearly satisfied.

This is an initialisation only: nothing of it is in the config.
"""

from __future__ import annotations

import torch

from davae.latents import LatentLayout, grouped_mean
from davae.models.base_adapters import Convolution
from davae.models.residual_sampling import ResidualDownsample, ResidualUpsample

START_LOGVAR = -6.0  # standard deviation 0.05: samples start close to their mean


@torch.no_grad()
def warm_up_block(block: ResidualUpsample, stem: Convolution, base_channels: slice) -> None:
    """Make the block give ``stem`` of the base channels at every sub-pixel, and ignore the details.

    Args:
        block: its channels as the decoder sees them.
        stem: base channels to first features, ``[F, C, 3, 3]``.
        base_channels: where the base channels stand in the block's input.
    """
    cells = block.factor**2
    weight = torch.zeros_like(block.conv.weight, dtype=torch.float32)
    weight[:, base_channels] = stem.weight.to(weight).repeat_interleave(cells, dim=0)
    if block.shortcut and block.shortcut_proj is None:  # what the shortcut adds is taken off again
        repeats = block.shortcut_channels // block.conv.in_channels
        outputs = torch.arange(block.shortcut_channels, device=weight.device)
        weight[outputs, outputs // repeats, 1, 1] -= 1.0
    block.conv.weight.copy_(weight)
    assert block.conv.bias is not None
    block.conv.bias.copy_(stem.bias.repeat_interleave(cells))


@torch.no_grad()
def warm_down_block(block: ResidualDownsample, head: Convolution, layout: LatentLayout) -> None:
    """Make the learned branch give the full-resolution base latent as mean and a small variance.

    Every row of the convolution serves ``s^2`` consecutive latent channels. With ``D = s^2 C`` each row is
    one base channel; elsewhere rows are the mixtures whose grouped mean is nearest to the base channels
    (least squares).

    Args:
        block: last features to mean and log-variance, ``2 D`` channels.
        head: last features to the base channels, ``[C, F, 3, 3]``.
        layout: channel counts.
    """
    cells, details = block.factor**2, layout.detail_channels
    rows = block.conv.out_channels
    means = details // cells  # rows that serve mean channels only
    first_logvar = -(-details // cells)
    weight = torch.zeros_like(block.conv.weight, dtype=torch.float32)
    bias = torch.zeros(rows, device=weight.device)
    if means:
        spread = torch.eye(rows)[:, :means].repeat_interleave(cells, dim=0)[
            :details
        ]  # [D, means]: row -> channels
        grouped = grouped_mean(spread.T[:, :, None, None], layout.base_channels)[:, :, 0, 0].T  # [C, means]
        mixture = torch.linalg.pinv(grouped).to(weight)  # [means, C]
        mixed = head.then(mixture, torch.zeros_like(mixture[:, 0]))
        weight[:means], bias[:means] = mixed.weight, mixed.bias
    bias[first_logvar:] = START_LOGVAR
    block.conv.weight.copy_(weight)
    assert block.conv.bias is not None
    block.conv.bias.copy_(bias)
