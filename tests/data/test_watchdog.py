"""Sources that hang, workers that die: an error that says what was being read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from davae.data import BatchStream, open_dataset
from davae.data.sources.folder import FolderSource
from davae.errors import DavaeError
from tests.data.files import encoded, image_folder, picture
from tests.data.test_webdataset import shard


class _Numbers(torch.utils.data.Dataset):
    """Six items; ``when_read(index)`` is called before one is given."""

    def __init__(self, when_read: Any) -> None:
        self.when_read = when_read

    def __len__(self) -> int:
        return 6

    def id(self, index: int) -> str:
        return f"part-{index // 3:03d}.tar/{index}.png"

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.when_read(index)
        return {"image": torch.full((2,), float(index)), "label": 0, "caption": "", "id": self.id(index)}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait five seconds for loader processes that hang to end by themselves."""
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)


def _hang(index: int) -> None:
    if index == 4:
        time.sleep(3600)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_hangs_is_named(workers: int, impatient: None) -> None:
    stream = BatchStream(_Numbers(_hang), 2, workers=workers, timeout_s=2.0)
    with pytest.raises(DavaeError, match=r"no batch arrived for 2 s; being read: part-001\.tar/4\.png \(for"):
        list(itertools.islice(stream, 3))
    assert stream.state_dict()["samples"] < 6  # and the place in the stream is that of the last batch taken


def test_a_disk_that_hangs_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_folder(tmp_path, {"a": 3})
    data = open_dataset(tmp_path, resolution=32)
    plain = FolderSource.open

    def open_file(source: FolderSource, index: int) -> BinaryIO:
        if source.id(index) == "a/001.png":
            time.sleep(3600)
        return plain(source, index)

    monkeypatch.setattr(FolderSource, "open", open_file)
    with pytest.raises(DavaeError, match=r"being read: a/001\.png"):
        list(itertools.islice(BatchStream(data, 1, timeout_s=0.5), 3))


def test_a_worker_that_is_killed_says_what_it_read(impatient: None) -> None:
    def die(index: int) -> None:
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(DavaeError, match=r"loader process was killed.*part-000\.tar/2\.png"):
        list(itertools.islice(BatchStream(_Numbers(die), 2, workers=1, timeout_s=60), 3))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_the_data_arrive_in_their_own_words(workers: int, impatient: None) -> None:
    def refuse(index: int) -> None:
        if index == 1:
            raise DavaeError("photos: none of the 6 images can be read")

    with pytest.raises(DavaeError, match=r"^photos: none of the 6 images can be read$"):
        list(itertools.islice(BatchStream(_Numbers(refuse), 2, workers=workers, timeout_s=60), 3))


def test_watching_changes_nothing_and_leaves_no_thread(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", {f"{n}.png": encoded(picture(n, (32, 32)), "PNG") for n in range(5)})
    data = open_dataset(tmp_path, resolution=32)
    before = set(threading.enumerate())
    watched, plain = (itertools.islice(BatchStream(data, 2, timeout_s=t), 4) for t in (60, 0))
    for a, b in zip(watched, plain, strict=True):
        assert a["id"] == b["id"]
        assert torch.equal(a["image"], b["image"])
    del watched
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
        assert not thread.is_alive()


def test_a_time_below_nothing_is_refused() -> None:
    with pytest.raises(DavaeError, match="timeout_s"):
        next(iter(BatchStream(_Numbers(lambda _: None), 1, timeout_s=-1)))


def test_workers_outlive_a_signal_to_all_processes_of_a_run(tmp_path: Path) -> None:
    """The step under way needs its batch; whoever waits for the workers ends them."""
    before = set(multiprocessing.active_children())
    batches = iter(BatchStream(_Numbers(lambda _: None), 2, workers=2, timeout_s=60))
    seen = [next(batches)["id"] for _ in range(2)]  # one of each worker, so that both are up
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    seen += [next(batches)["id"] for _ in range(4)]
    assert seen == [b["id"] for b in itertools.islice(BatchStream(_Numbers(lambda _: None), 2), 6)]
    del batches
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()
