"""Statistics of an autoencoder's latents over training images, measured once before it is written."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from davae.data import ItemDataset, read_items
from davae.data.in_memory import encode_by_size
from davae.latents import ChannelStatistics
from davae.runtime.processes import everyone, rank_and_world

logger = logging.getLogger(__name__)

_ROUND = 1024
_STILL = 0.005
"""Share of a channel's standard deviation that a round must move the mean or deviation by to call for another."""
_READ_TOGETHER = 32


@torch.no_grad()
def measure_latents(
    dataset: ItemDataset,
    encode: Callable[[Tensor], Tensor],
    channels: int,
    *,
    most: int | None = None,
    workers: int = 0,
    timeout_s: float = 0.0,
) -> ChannelStatistics:
    """Mean and deviation of each latent channel over images of a data set; the same in every process.

    Images are divided among the processes, 1024 at a time over all, until another round moves no channel by more
    than 0.5 % of its standard deviation. All ranks must call this.

    Args:
        dataset: images ``[3, H, W]``.
        encode: ``[B, 3, H, W]`` on the CPU to ``[B, C, h, w]``.
        channels: ``C``.
        most: number of images to stop at; by default all.
        workers: loader processes.
        timeout_s: seconds to wait for a part; 0 waits indefinitely.
    """
    count = len(dataset) if most is None else min(most, len(dataset))
    rank, world = rank_and_world()
    measured = ChannelStatistics(channels)
    for first in range(0, count, _ROUND):
        last = min(first + _ROUND, count)
        own = ChannelStatistics(channels)
        mine = range(first, last)[rank::world]
        for items in read_items(dataset, mine, batch_size=_READ_TOGETHER, workers=workers, timeout_s=timeout_s):
            for latent in encode_by_size([item["image"] for item in items], encode):
                own.update(latent[None])
        before = (measured.mean, measured.std) if measured.count else None
        for state in everyone(own.state_dict()):
            other = ChannelStatistics(channels)
            other.load_state_dict(state)
            measured.merge(other)
        if before is not None and last < count and _stands_still(before, measured):
            logger.info("latent statistics stand still after %d of %d images", last, count)
            break
    return measured


def _stands_still(before: tuple[Tensor, Tensor], now: ChannelStatistics) -> bool:
    mean, std = before
    moved = torch.maximum((now.mean - mean).abs(), (now.std - std).abs())
    return bool((moved <= _STILL * now.std).all())
