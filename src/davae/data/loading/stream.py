"""An endless stream of batches whose position can be saved and restored exactly, and reading in a given order."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from davae.data.images.protocol import Item, as_item_dataset
from davae.data.loading.samplers import BucketSampler, Key, ResumableSampler
from davae.data.loading.watchdog import WatchedItems, end_workers, outlive_signals
from davae.errors import DavaeError


class BatchStream:
    """Batches of a data set for the training loop; ``state_dict`` counts what the loop has consumed.

    Every ``iter(stream)`` starts at the current position. Iterating does not change torch's global random state. With
    aspect-ratio buckets (a list ``bucket_of``) each batch is from one bucket.

    Args:
        dataset: map-style; its ``item(index, epoch)`` is used if it has one, else ``dataset[index]``.
        batch_size: images per batch and process.
        seed: of the order.
        workers: loader processes; 0 decodes in this one. The batches are the same.
        rank: this process.
        world_size: number of processes.
        timeout_s: seconds to wait for a batch before a :class:`DavaeError` names what was being read; 0 waits
            indefinitely.
    """

    def __init__(
        self,
        dataset: Dataset[Item],
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        timeout_s: float = 0.0,
    ) -> None:
        self.dataset, self.workers, self.timeout_s = as_item_dataset(dataset), workers, timeout_s
        length, buckets = len(self.dataset), self.dataset.bucket_of
        self.sampler: ResumableSampler | BucketSampler
        if buckets is None:
            self.sampler = ResumableSampler(length, batch_size, seed, rank=rank, world_size=world_size)
        else:
            self.sampler = BucketSampler(buckets, batch_size, seed, rank=rank, world_size=world_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        items = WatchedItems(self.dataset, self.workers, self.timeout_s)
        with frozen_objects(self.workers), closing(items):
            batches = iter(_loader(items, self.sampler))
            while True:
                try:
                    with items.stalls_as_errors():
                        batch = next(batches)
                except DavaeError:
                    end_workers(batches)
                    raise
                self.sampler.advance()
                yield batch

    @property
    def epoch(self) -> float:
        """The number of passes over the data set so far, as a fraction."""
        return self.sampler.samples / self.sampler.length

    def state_dict(self) -> dict[str, int]:
        """The position in the stream after the batches consumed so far."""
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, int], *, grown: bool = False) -> None:
        """Continue from a saved position, or with the next epoch if images were added (``grown``); takes effect at the
        next ``iter``.
        """
        self.sampler.load_state_dict(state, grown=grown)


def read_items(
    dataset: Dataset[Item], positions: Sequence[int], *, batch_size: int, workers: int = 0, timeout_s: float = 0.0
) -> Iterator[list[Item]]:
    """Items of a data set in a given order, ``batch_size`` at a time, as in the first epoch.

    Args:
        dataset: map-style.
        positions: indices of the items, in order.
        batch_size: items per part.
        workers: loader processes; 0 reads in this one.
        timeout_s: seconds that loader processes may take for a part before a :class:`DavaeError` names what was
            being read; 0 waits indefinitely.
    """
    parts = [
        [Key(0, position) for position in positions[first : first + batch_size]]
        for first in range(0, len(positions), batch_size)
    ]
    with frozen_objects(workers), closing(WatchedItems(dataset, workers, timeout_s if workers else 0)) as items:
        batches = iter(_loader(items, parts, _packed))
        for _ in parts:
            try:
                with items.stalls_as_errors():
                    part = next(batches)
            except DavaeError:
                end_workers(batches)
                raise
            yield _unpacked(*part)


def _packed(items: list[Item]) -> tuple[list[Item], dict[str, torch.Tensor]]:
    """Stack tensors of equal size over items, since each tensor sent by a loader process uses an open file."""
    names = [name for name, value in items[0].items() if isinstance(value, torch.Tensor)]
    alike = [name for name in names if len({item[name].shape for item in items}) == 1]
    rest = [{name: value for name, value in item.items() if name not in alike} for item in items]
    return rest, {name: torch.stack([item[name] for item in items]) for name in alike}


def _unpacked(rest: list[Item], stacked: dict[str, torch.Tensor]) -> list[Item]:
    # Tensors that stay in memory must not keep a file open.
    own = {name: tensor.clone() if tensor.is_shared() else tensor for name, tensor in stacked.items()}
    return [item | {name: tensor[i] for name, tensor in own.items()} for i, item in enumerate(rest)]


def _loader(
    items: WatchedItems, batches: Iterable[list[Key]], put_together: Callable[[list[Item]], Any] | None = None
) -> DataLoader[Any]:
    return DataLoader(
        items,
        batch_sampler=batches,
        num_workers=items.workers,
        collate_fn=put_together or collate,
        pin_memory=torch.cuda.is_available() and put_together is None,
        timeout=items.timeout_s if items.workers else 0,
        worker_init_fn=outlive_signals,
        generator=torch.Generator(),  # otherwise the loader draws from torch's global state
    )


def collate(items: Sequence[Item]) -> dict[str, Any]:
    """Make a batch of items.

    Tensors (``image`` ``[B, 3, R, R]``, or a cached ``latent``) are stacked, and so are those in dictionaries
    (``conditioning``); ``label`` is long ``[B]``, ``caption`` and ``id`` are lists of text, ``skipped`` holds
    the entries of all items in one list.
    """
    tensors = [name for name, value in items[0].items() if isinstance(value, torch.Tensor)]
    dictionaries = [name for name, value in items[0].items() if isinstance(value, dict)]
    return {
        **{name: torch.stack([item[name] for item in items]) for name in tensors},
        **{
            name: {key: torch.stack([item[name][key] for item in items]) for key in items[0][name]}
            for name in dictionaries
        },
        "label": torch.tensor([item["label"] for item in items], dtype=torch.long),
        "caption": [item["caption"] for item in items],
        "id": [item["id"] for item in items],
        "skipped": [entry for item in items for entry in item.get("skipped", ())],
    }


@contextmanager
def frozen_objects(workers: int) -> Iterator[None]:
    """Context in which the garbage collector, here and in forks, ignores the objects that exist at its start.

    Enter it before ``workers`` processes are forked. Without workers, or if objects are frozen already, it does
    nothing.

    A forked process shares its parent's memory pages until one of the two writes to them. Python's garbage collector
    writes to the header of every object that it visits: its first full collection, minutes after the start, would give
    each loader process its own copy of all objects of the imported libraries, about 140 MB.
    """
    if not workers or gc.get_freeze_count():
        yield
        return
    gc.collect()  # present garbage would otherwise be kept
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
