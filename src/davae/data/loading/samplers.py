"""Endless streams of batches whose position can be saved: for images of one size, and for buckets.

Every epoch is a new permutation, made from ``(seed, epoch)``; epochs follow each other without a gap and a
batch may straddle two, so each image comes exactly once per epoch, and data sets smaller than a batch work too. The
position in the stream is the number of images that the training has consumed, not what loader processes have
prefetched.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from davae.errors import DavaeError


class Key(NamedTuple):
    """An item in an epoch."""

    epoch: int
    position: int


class ResumableSampler(Sampler[list[Key]]):
    """Endless batches of keys, starting at :attr:`samples`.

    All processes together take ``batch_size * world_size`` images at a time; process ``rank`` gets a contiguous part
    of them. Iterating does not change :attr:`samples`: the consumer of the batches calls :meth:`advance`.

    Args:
        length: number of images.
        batch_size: images per batch and process.
        seed: of the permutations.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1) -> None:
        if length < 1:
            raise DavaeError("the data set is empty")
        if batch_size < 1:
            raise DavaeError(f"batch_size must be positive, not {batch_size}")
        if not 0 <= rank < world_size:
            raise DavaeError(f"rank {rank} is not one of {world_size} processes")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.samples = 0
        """Images consumed by all processes since the first epoch began."""

    def __iter__(self) -> Iterator[list[Key]]:
        start = self.samples + self.rank * self.batch_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        while True:
            keys = []
            for sample in range(start, start + self.batch_size):
                if sample // self.length != epoch:
                    epoch = sample // self.length
                    order = self.permutation(epoch)
                keys.append(Key(epoch, int(order[sample % self.length])))
            yield keys
            start += self.batch_size * self.world_size

    def permutation(self, epoch: int) -> np.ndarray:
        """Order of the images in an epoch: int64 ``[length]``, a function of ``(seed, epoch)``."""
        return np.random.default_rng((self.seed % 2**63, epoch)).permutation(self.length)

    def advance(self) -> None:
        """Record that every process has consumed one batch."""
        self.samples += self.batch_size * self.world_size

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, as plain numbers."""
        return {"samples": self.samples, "length": self.length, "seed": self.seed}

    def load_state_dict(self, state: dict[str, int], *, grown: bool = False) -> None:
        """Continue where ``state`` was taken; batch size and number of processes may differ.

        Args:
            state: from :meth:`state_dict`.
            grown: images were added since; the stream then continues with the next epoch.

        Raises:
            DavaeError: the data set or the seed differs.
        """
        if "buckets" in state:
            raise DavaeError(
                "the checkpoint was written with aspect-ratio buckets and the data has none now; set "
                "data.buckets as it was, or start in a new run directory"
            )
        for name, now in (("length", self.length), ("seed", self.seed)):
            if state[name] != now and not (grown and name == "length"):
                what = "number of images" if name == "length" else "seed of the data order"
                raise DavaeError(
                    f"the {what} was {state[name]} when the checkpoint was written and is {now} now, so the "
                    f"training cannot go on exactly; restore it, or start in a new run directory"
                )
        self.samples = int(state["samples"])
        if grown:
            self.samples = -(-self.samples // int(state["length"])) * self.length


class BucketSampler(Sampler[list[Key]]):
    """Endless batches of keys, each from one bucket, starting at :attr:`samples`.

    Each bucket has its own stream: one permutation of its images after the other. Batch ``j`` of a bucket is
    its images ``j G .. (j + 1) G - 1``, with ``G`` the images that all processes take together, and belongs to the
    epoch of its first image. Within an epoch the order of the buckets is random.

    No image is dropped or repeated: each comes exactly once in each pass over its bucket. A bucket's last batch of an
    epoch is filled from its next permutation (up to ``G - 1`` images), as batches of one size straddle epochs too.

    All processes get parts of the same ``G`` images, so the same bucket. Iterating does not change
    :attr:`samples`: the consumer of the batches calls :meth:`advance`.

    Args:
        buckets: the bucket number of each image.
        batch_size: images per batch and process.
        seed: of the permutations.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self, buckets: Sequence[int], batch_size: int, seed: int = 0, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if not len(buckets):
            raise DavaeError("the data set is empty")
        if batch_size < 1:
            raise DavaeError(f"batch_size must be positive, not {batch_size}")
        if not 0 <= rank < world_size:
            raise DavaeError(f"rank {rank} is not one of {world_size} processes")
        numbers = np.asarray(buckets, dtype=np.int64)
        self.members = [np.flatnonzero(numbers == bucket) for bucket in np.unique(numbers)]
        """Positions of the images of each bucket that is not empty."""
        self.length, self.batch_size, self.seed = len(numbers), batch_size, seed
        self.rank, self.round = rank, batch_size * world_size
        self.samples = 0
        """Images consumed by all processes since the first epoch began."""
        self._digest = zlib.crc32(numbers.tobytes())

    def __iter__(self) -> Iterator[list[Key]]:
        number = self.samples // self.round
        epoch = self._epoch_of(number)
        skip = number - self._batches_before(epoch)
        while True:
            for bucket, batch in self._batches_of(epoch)[skip:]:
                yield self._keys(bucket, batch)
            epoch, skip = epoch + 1, 0

    def advance(self) -> None:
        """Record that every process has consumed one batch."""
        self.samples += self.round

    def state_dict(self) -> dict[str, int]:
        """The position in the stream, as plain numbers."""
        return {
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "round": self.round,
            "buckets": self._digest,
        }

    def load_state_dict(self, state: dict[str, int], *, grown: bool = False) -> None:
        """Continue where ``state`` was taken; ``batch_size * world_size`` must be the same.

        Args:
            state: from :meth:`state_dict`.
            grown: as for :meth:`ResumableSampler.load_state_dict`.

        Raises:
            DavaeError: data set, buckets, seed or ``batch_size * world_size`` differ.
        """
        names = {
            "length": "number of images",
            "seed": "seed of the data order",
            "round": "number of images per step (batch size x processes), which buckets fix,",
            "buckets": "assignment of images to buckets (its checksum)",
        }
        for name, what in names.items():
            now = self.state_dict()[name]
            if state.get(name) != now and not (grown and name in ("length", "buckets") and name in state):
                was = state.get(name, "unknown: the run had no buckets")
                raise DavaeError(
                    f"the {what} was {was} when the checkpoint was written and is {now} now, so the "
                    f"training cannot go on exactly; restore it, or start in a new run directory"
                )
        self.samples = int(state["samples"])
        if grown:
            epoch = -(-self.samples // int(state["length"]))
            self.samples = self._batches_before(epoch) * self.round

    def _keys(self, bucket: int, batch: int) -> list[Key]:
        members = self.members[bucket]
        start = batch * self.round + self.rank * self.batch_size
        keys, turn, order = [], -1, members
        for place in range(start, start + self.batch_size):
            if place // len(members) != turn:
                turn = place // len(members)
                order = members[self._random(turn, bucket).permutation(len(members))]
            keys.append(Key(turn, int(order[place % len(members)])))
        return keys

    def _batches_of(self, epoch: int) -> list[tuple[int, int]]:
        """(bucket, batch of that bucket) of an epoch: buckets in random order, a bucket's batches in order."""
        turns: list[int] = []
        waiting = []
        for bucket, members in enumerate(self.members):
            first, last = (-(-e * len(members) // self.round) for e in (epoch, epoch + 1))
            turns += [bucket] * (last - first)
            waiting.append(iter(range(first, last)))
        order = self._random(epoch, len(self.members)).permutation(len(turns))
        return [(turns[i], next(waiting[turns[i]])) for i in order]

    def _batches_before(self, epoch: int) -> int:
        return sum(-(-epoch * len(members) // self.round) for members in self.members)

    def _epoch_of(self, number: int) -> int:
        """The epoch that batch ``number`` of the whole stream belongs to."""
        # Before epoch e there are at least e n / G batches, and at most one more per bucket.
        epoch = max(0, (number - len(self.members)) * self.round // self.length - 1)
        while self._batches_before(epoch + 1) <= number:
            epoch += 1
        return epoch

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        # Four numbers, to be distinct from an item's generator (three) and the sampler of one size (two).
        return np.random.default_rng((self.seed % 2**63, epoch, stream, 0))
