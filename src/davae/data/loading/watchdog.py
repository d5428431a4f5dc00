"""Time-outs for data sources that stop responding, with the names of the files being read.

A network disk that hangs raises no error, and a training would wait for it silently and without end. So each reader
records the image it reads in memory shared by all loader processes, and the process that waits for the batch stops
after ``timeout_s`` and reports what was being read.
"""

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset, get_worker_info

from davae.data.images.protocol import Item, as_item_dataset
from davae.data.loading.samplers import Key
from davae.errors import DavaeError

_NAMED = 4
_DEAD_WORKER = "a loader process was killed, perhaps because memory ran out"
_WHAT_TO_DO = "Lower data.workers, or look in the system's log for what killed it"
#: Torch's prefix for errors of loader processes.
_FROM_A_WORKER = "Original Traceback (most recent call last)"


class WatchedItems(Dataset[Item]):
    """A data set's items by (epoch, position), so that loader processes need no message about a new epoch.

    Args:
        dataset: map-style; its ``item(index, epoch)`` is used if it has one, else ``dataset[index]``.
        workers: loader processes.
        timeout_s: seconds that reading a batch may take; 0 waits indefinitely.
    """

    def __init__(self, dataset: Dataset[Item], workers: int = 0, timeout_s: float = 0.0) -> None:
        if workers < 0:
            raise DavaeError(f"workers must be 0 or more, not {workers}")
        if timeout_s < 0:
            raise DavaeError(f"timeout_s must be 0 (wait indefinitely) or more seconds, not {timeout_s:g}")
        self.workers, self.timeout_s = workers, timeout_s
        self._dataset = as_item_dataset(dataset)
        # For each loader process: the position being read (-1: none) and when that started.
        self._reading = torch.full((max(1, workers), 2), -1.0, dtype=torch.float64).share_memory_()
        self._thread: _ReadingThread | None = None

    def __getitem__(self, key: Key) -> Item:
        worker = get_worker_info()
        slot = self._reading[0 if worker is None else worker.id]
        slot[1], slot[0] = time.monotonic(), key.position
        item = self._dataset.item(key.position, key.epoch)
        slot[0] = -1
        return item

    def __getitems__(self, keys: list[Key]) -> list[Item]:
        """A batch's items; read in a thread if there are no loader processes, so that this one can time out."""
        if self.timeout_s == 0 or get_worker_info() is not None:
            return [self[key] for key in keys]
        if self._thread is None:
            self._thread = _ReadingThread()
        try:
            return self._thread.call(lambda: [self[key] for key in keys], self.timeout_s)
        except queue.Empty:
            raise DavaeError(self._stalled_message()) from None

    @contextmanager
    def stalls_as_errors(self) -> Iterator[None]:
        """Context that raises errors of loader processes as if they had occurred in this process.

        Raises:
            DavaeError: the time-out expired or a loader process died; the message names the images being read.
        """
        try:
            yield
        except DavaeError as error:
            if _FROM_A_WORKER not in str(error):
                raise
            raise DavaeError(str(error).strip().rpartition("DavaeError: ")[2]) from error
        except RuntimeError as error:
            if "DataLoader timed out" in str(error):
                raise DavaeError(self._stalled_message()) from error
            if is_of_a_dead_worker(error):
                raise DavaeError(f"{_DEAD_WORKER}; {self._reading_message()}. {_WHAT_TO_DO}") from error
            raise

    def close(self) -> None:
        """End the reading thread, if there is one."""
        if self._thread is not None:
            self._thread.end()
            self._thread = None

    def _stalled_message(self) -> str:
        return (
            f"no batch arrived for {self.timeout_s:g} s; {self._reading_message()}. Look at the disk or the network "
            "that holds it, then run the same command again; data.timeout_s sets another time, 0 waits indefinitely"
        )

    def _reading_message(self) -> str:
        now = time.monotonic()
        slots = sorted((began, int(position)) for position, began in self._reading.tolist() if position >= 0)
        if not slots:
            return "no image was being read"
        message = [f"{self._dataset.id(position)} (for {now - began:.0f} s)" for began, position in slots[:_NAMED]]
        return f"being read: {', '.join(message)}"  # the longest first


def is_of_a_dead_worker(error: RuntimeError) -> bool:
    """Whether torch reports that a loader process died; the error may come anywhere, since a signal triggers it."""
    return "DataLoader worker" in str(error) and any(
        words in str(error) for words in ("exited unexpectedly", "killed by signal")
    )


def dead_worker_message() -> str:
    """The message if it is not known what was being read."""
    return f"{_DEAD_WORKER}. {_WHAT_TO_DO}"


def outlive_signals(_worker: int) -> None:
    """Make a loader process ignore the signals that ask a run to stop.

    Ctrl-C and Slurm's SIGTERM and SIGUSR1 reach loader processes too, but the training needs them to finish its step
    and save. They end with the training, or at the second SIGTERM.
    """
    for name in ("SIGINT", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    asked: list[bool] = []

    def listen(*_: Any) -> None:
        if asked:
            os._exit(0)
        asked.append(True)

    signal.signal(signal.SIGTERM, listen)


def end_workers(batches: Any) -> None:
    """End the loader processes of a torch loader's iterator, even one that hangs."""
    workers = list(getattr(batches, "_workers", ()))
    if workers:
        batches._shutdown_workers()  # first: afterwards torch does not report killed processes
    for process in workers:
        process.kill()


class _ReadingThread:
    """A daemon thread for reads: one that hangs cannot be ended, and must not keep the program from exiting."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="reading", daemon=True).start()

    def call(self, job: Callable[[], Any], timeout_s: float) -> Any:
        """Run a job and return its result; its errors are raised here.

        Raises:
            queue.Empty: it takes longer than ``timeout_s``.
        """
        answer: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._jobs.put((job, answer))
        value, error = answer.get(timeout=timeout_s)
        if error is not None:
            raise error
        return value

    def end(self) -> None:
        """End the thread; no more jobs follow."""
        self._jobs.put(None)

    def _work(self) -> None:
        # For this thread only: OpenMP gives every computing thread its own team, and two teams waiting for work on
        # the same cores slow a training on a CPU down by a quarter.
        torch.set_num_threads(1)
        while (asked := self._jobs.get()) is not None:
            job, answer = asked
            del asked
            try:
                answer.put((job(), None))
            except Exception as error:  # noqa: BLE001 - raised where the answer is taken
                answer.put((None, error))
            del job, answer  # else the last batch would stay in memory while waiting
