"""The fitted start of stage 1: some training images, once, before the first step."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from davae.data import Item, ItemDataset, read_items
from davae.models import AutoencoderDA, fit_start
from davae.recipes.settings import AutoencoderSettings
from davae.runtime.processes import is_first, rank_and_world, start_processes
from davae.runtime.progress import Progress
from davae.training.autoencoder.objective import alignment_layout

_READ_TOGETHER = 8


def fit_levels(
    vae: AutoencoderDA,
    numbers: Sequence[int],
    settings: AutoencoderSettings,
    dataset: ItemDataset,
    *,
    workers: int = 0,
    timeout_s: float = 0.0,
) -> None:
    """Fit the new blocks of levels to ``settings.start_images`` images, the same on any number of processes.

    Args:
        vae: changed in place, on the device of the run.
        numbers: of the levels, lowest first; the images of a lower one are reduced to its resolution.
        settings: the recipe's section; its seed chooses the images.
        dataset: training images at the last level's resolution, as in the first epoch.
        workers: loader processes.
        timeout_s: seconds to wait for a part; 0 waits indefinitely.
    """
    vae.to(start_processes().device)
    random = torch.Generator().manual_seed(settings.loop.seed)
    chosen = torch.randperm(len(dataset), generator=random)[: settings.start_images].tolist()
    rank, world = rank_and_world()
    mine = chosen[rank::world]
    for number in numbers:
        level = vae.at_level(number)
        above = [vae.at_level(other) for other in range(vae.levels[-1].number, number, -1)]
        aligned = alignment_layout(level, settings.alignment).base_channels
        with Progress(f"start of level {number}, fitted", len(mine), enabled=is_first()) as progress:
            parts = read_items(dataset, mine, batch_size=_READ_TOGETHER, workers=workers, timeout_s=timeout_s)
            fit_start(level, _reduced(parts, above, progress), aligned_channels=aligned)


def _reduced(parts: Iterable[Sequence[Item]], above: Sequence[AutoencoderDA], progress: Progress) -> Iterator[Tensor]:
    """Images ``[1, 3, H, W]`` of items, one after the other, reduced by the levels above the one that is fitted."""
    for item in (item for part in parts for item in part):
        image = item["image"][None]
        for level in above:
            image = level.reduce(image)
        yield image
        progress.advance()
