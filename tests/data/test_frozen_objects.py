"""Loader processes share the memory of the training also after a full garbage collection."""

import gc
import itertools
import sys
from pathlib import Path

import pytest
import torch

from davae.data import BatchStream


def _own_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_Dirty"))


class _Collecting(torch.utils.data.Dataset):
    """Each item is what a full collection costs the process that makes it."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        before = _own_bytes()
        gc.collect()
        grown = torch.tensor([float(_own_bytes() - before), float(gc.get_freeze_count())])
        return {"image": grown, "label": 0, "caption": "", "id": str(index)}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_collection_in_a_loader_process_copies_nothing():
    stream = iter(BatchStream(_Collecting(), 1, workers=1))
    grown, frozen = next(stream)["image"][0].tolist()
    assert frozen > 100_000  # objects of torch and diffusers alone
    assert grown < 20e6  # without it more than 100 MB: heads of all objects are written to
    assert gc.get_freeze_count() > 0
    stream.close()
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen():
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        assert len(list(itertools.islice(BatchStream(_Collecting(), 1, workers=1), 2))) == 2
        assert gc.get_freeze_count() > 0.9 * frozen  # some have died meanwhile
    finally:
        gc.unfreeze()


def test_without_loader_processes_nothing_is_frozen():
    stream = iter(BatchStream(_Collecting(), 1))
    assert next(stream)["image"][0, 1] == 0
    stream.close()
