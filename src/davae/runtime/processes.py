"""The processes that a launcher started: rank and world, and work that they share.

Validation, encoding and measuring are shared. Every process takes equally many of the things to do, so that models
whose weights are spread over the processes are called equally often by all; where the number does not divide, the last
thing is done twice and counted once. Results are put together in the order of the things, so they do not depend on the
number of processes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from davae.errors import DavaeError
from davae.runtime.places import KindName, claim

T = TypeVar("T")

_SENT_TOGETHER = 256

LONGEST_WAIT = timedelta(hours=2)
"""For the slowest process, or the one that exports while the others wait. torch's own limit is ten minutes."""


LAUNCHER = "the accelerate configuration (--config_file)"
"""What errors call the file that a launcher was given."""


def start_processes(*, cpu: bool | None = None, timeout: timedelta = LONGEST_WAIT) -> PartialState:
    """Let the processes that a launcher started find each other, and give each its device; once is enough.

    Training does it by itself. It must happen before anything is shared out or put on "the" GPU.

    Args:
        cpu: stay on the CPU; by default where training knows no accelerator.
        timeout: how long one process waits for the others.

    Raises:
        DavaeError: the launcher asks for DeepSpeed.
    """
    refuse_deepspeed()
    return PartialState(cpu=use_cpu() if cpu is None else cpu, timeout=timeout)


def refuse_deepspeed() -> None:
    """Fail before anything starts where the launcher asks for DeepSpeed.

    Raises:
        DavaeError: naming the configurations that do the same with torch alone.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise DavaeError(
            f"{LAUNCHER} asks for DeepSpeed, which davae does not use. torch alone does the same: take "
            "configs/accelerate/fsdp2-zero2.yaml for ZeRO-2, configs/accelerate/fsdp2.yaml for ZeRO-3"
        )


def use_cpu() -> bool:
    """Whether there is no accelerator that training knows."""
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def rank_and_world() -> tuple[int, int]:
    """This process's number and how many there are; ``(0, 1)`` where no launcher started any."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank_and_world()[0] == 0


def share(count: int) -> list[int]:
    """This process's positions of ``range(count)``, in order and equally many in every process.

    Process ``r`` of ``W`` takes ``r n ... r n + n - 1`` with ``n = ceil(count / W)``; beyond the end the last position
    stands in, which :func:`gathered` leaves out again.
    """
    rank, world = rank_and_world()
    each = -(-count // world)
    return [min(rank * each + i, count - 1) for i in range(each)]


def gathered(own: Sequence[T], count: int) -> list[T]:
    """The results of all positions of ``range(count)``, in every process.

    They are sent some at a time: what is on its way takes memory besides, several times over.

    Args:
        own: this process's results, one for each position of :func:`share`. Tensors should be on the CPU.
        count: how many there are in all.
    """
    rank, world = rank_and_world()
    parts: list[list[T]] = [[] for _ in range(world)]
    parts[rank] = list(own)
    for first in range(0, len(own) if world > 1 else 0, _SENT_TOGETHER):
        sent = everyone([_compact(value) for value in own[first : first + _SENT_TOGETHER]])
        for other in range(world):
            if other != rank:
                parts[other] += sent[other]
    return _put_together(parts, count)


def gathered_in_first(own: Sequence[T], count: int) -> list[T]:
    """As :func:`gathered` in the first process, nothing in the others: for pictures, which are large."""
    rank, world = rank_and_world()
    if world == 1:
        return _put_together([own], count)
    parts: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object([_compact(value) for value in own], parts, dst=0)
    return [] if parts is None else _put_together(parts, count)


def everyone(value: T) -> list[T]:
    """A plain value of each process, in every process; all ranks must call this."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def all_the_same(what: str, own: str, where: str) -> None:
    """Make sure that the processes begin with the same thing, in all of them at once.

    Args:
        what: that is compared, for the error.
        own: what this process found.
        where: it was looked for.

    Raises:
        DavaeError: they differ, as folders do that not all machines share.
    """
    found = everyone(own)
    if len(set(found)) > 1:
        message = "; ".join(f"process {rank}: {value}" for rank, value in enumerate(found))
        raise DavaeError(
            f"the processes do not agree on {what}: {message}. All must see the same files; compare {where} on "
            "each machine"
        )


def wait_for_everyone() -> None:
    """Wait until all ranks have called this."""
    everyone(None)


@contextmanager
def claimed_by_first(folder: Path, kind: KindName) -> Iterator[None]:
    """Within the block the folder is that of these processes: the first one claims it, see
    :func:`davae.runtime.places.claim`.
    """
    start_processes()
    with claim(folder, kind) if is_first() else nullcontext():
        yield


def _compact(value: Any) -> Any:
    """The same value for sending: a row of a batch would take the whole batch with it."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {key: _compact(inner) for key, inner in value.items()}
    if type(value) is tuple:
        return tuple(_compact(inner) for inner in value)
    return value


def _put_together(parts: Sequence[Sequence[T]], count: int) -> list[T]:
    return [value for part in parts for value in part][:count]
