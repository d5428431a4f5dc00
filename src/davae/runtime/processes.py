"""The processes that a launcher started: rank, world size, and how they divide work.

Validation, encoding and measuring are divided. Every process takes equally many items, so that all call a sharded model
equally often; where the number of items does not divide, the last one is repeated and counted once. Results are
gathered in the order of the items, so they do not depend on the number of processes.
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
_MOST_WORKERS = 8

LONGEST_WAIT = timedelta(hours=2)
"""Time-out of collective operations: others wait while one process exports. torch's own limit is ten minutes."""

UNEVEN_WAIT = timedelta(days=7)
"""Time-out where each process works for hours or days by itself, and the fastest waits for the slowest."""

LAUNCHER = "the accelerate configuration (--config_file)"
"""What errors call the configuration file of a launcher."""


def start_processes(*, cpu: bool | None = None, timeout: timedelta = LONGEST_WAIT) -> PartialState:
    """Connect the processes that a launcher started and assign each its device; later calls change nothing.

    Training does this itself. It must happen before work is divided or a model is put on "the" GPU.

    Args:
        cpu: stay on the CPU; by default if training has no accelerator to use.
        timeout: how long one process waits for the others.

    Raises:
        DavaeError: the launcher asks for DeepSpeed.
    """
    refuse_deepspeed()
    return PartialState(cpu=use_cpu() if cpu is None else cpu, timeout=timeout)


def refuse_deepspeed() -> None:
    """Refuse a launcher's configuration that asks for DeepSpeed.

    Raises:
        DavaeError: it does; the message names the configurations that do the same with torch alone.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise DavaeError(
            f"{LAUNCHER} asks for DeepSpeed, which davae does not use. torch alone does the same: use "
            "configs/accelerate/fsdp2-zero2.yaml for ZeRO-2, configs/accelerate/fsdp2.yaml for ZeRO-3 "
            "(`davae configs` writes them)"
        )


def use_cpu() -> bool:
    """Whether there is no accelerator (CUDA or MPS) that training can use."""
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()


def loader_workers(asked: int | None) -> int:
    """The number of loader processes: by default one per processor of this process, at most 8.

    All processes that a launcher started on this machine share its processors.
    """
    if asked is not None:
        return asked
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, processors // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the world size; ``(0, 1)`` without a launcher."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first() -> bool:
    """Whether this is rank 0, the process that writes."""
    return rank_and_world()[0] == 0


def share(count: int) -> list[int]:
    """This process's positions in ``range(count)``, in order, equally many in every process.

    Rank ``r`` of ``W`` takes ``r n, ..., r n + n - 1`` with ``n = ceil(count / W)``; positions beyond the end are
    replaced by the last one, and :func:`gathered` drops the repetitions.
    """
    rank, world = rank_and_world()
    each = -(-count // world)
    return [min(rank * each + i, count - 1) for i in range(each)]


def gathered(own: Sequence[T], count: int) -> list[T]:
    """The results for all of ``range(count)``, in every process; all ranks must call this.

    Results are sent in parts, since objects in transit take several times their memory.

    Args:
        own: this process's results, one per position of :func:`share`. Tensors should be on the CPU.
        count: number of results in all.
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
    """:func:`gathered` in the first process only, an empty list in the others; for images, which are large."""
    rank, world = rank_and_world()
    if world == 1:
        return _put_together([own], count)
    parts: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object([_compact(value) for value in own], parts, dst=0)
    return [] if parts is None else _put_together(parts, count)


def everyone(value: T) -> list[T]:
    """The value (picklable) of each process, in rank order, in every process; all ranks must call this."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def all_the_same(what: str, own: str, where: str) -> None:
    """Check that all processes found the same; all ranks must call this, and all raise if not.

    Args:
        what: is compared, for the error.
        own: what this process found.
        where: this process looked, for the error.

    Raises:
        DavaeError: the processes found different things, as with folders that not all machines share.
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
    """Context in which the first process holds the folder's :func:`~davae.runtime.places.claim` for all of them."""
    start_processes()
    with claim(folder, kind) if is_first() else nullcontext():
        yield


def _compact(value: Any) -> Any:
    """Copy tensors that are views of larger storage: pickling a row would send the whole batch."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        return {key: _compact(inner) for key, inner in value.items()}
    if type(value) is tuple:
        return tuple(_compact(inner) for inner in value)
    return value


def _put_together(parts: Sequence[Sequence[T]], count: int) -> list[T]:
    return [value for part in parts for value in part][:count]
