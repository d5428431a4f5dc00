import time
from pathlib import Path

import pytest
import torch

from davae.benchmark import SideBySide, peak_memory_bytes, side_by_side
from davae.errors import DavaeError
from tests.end_to_end import children


def test_median_is_about_the_time_slept_and_warmup_is_not_counted() -> None:
    waits = iter([0.2, 0.01, 0.01, 0.01])
    timed = side_by_side({"sleep": lambda: time.sleep(next(waits))}, 3, warmup=1)
    assert 0.009 < timed.medians["sleep"] < 0.1
    assert next(waits, None) is None


def test_functions_take_turns() -> None:
    calls: list[str] = []
    result = side_by_side({name: lambda name=name: calls.append(name) for name in "ab"}, 3, warmup=1)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in result.times.items()} == {"a": 3, "b": 3}


def test_speedup_is_taken_round_by_round() -> None:
    # The machine slows down by ten in the second round; the ratio stays two.
    result = SideBySide({"quick": [1.0, 10.0, 1.0], "slow": [2.0, 20.0, 2.0]})
    assert result.speedup("quick", over="slow") == 2.0
    assert result.medians == {"quick": 1.0, "slow": 2.0}
    with pytest.raises(DavaeError, match="'fast' was timed; there are quick, slow"):
        result.speedup("fast", over="slow")


def _peaks(file: Path) -> None:
    before = peak_memory_bytes()
    held = torch.ones(2**28)
    file.write_text(f"{before} {peak_memory_bytes()} {held.numel()}")


def test_peak_memory_sees_a_large_tensor(tmp_path: Path) -> None:
    """In a process of its own: the peak of this one may lie in a test that ran before."""
    log = tmp_path / "log"
    children.finish(children.start(_peaks, tmp_path / "peaks", log=log), log)
    before, after, elements = map(int, (tmp_path / "peaks").read_text().split())
    assert 2**24 < before < after
    assert 2**29 < after - before < 4 * elements + 2**28


def test_mistakes_are_named() -> None:
    with pytest.raises(DavaeError, match="repeats must be at least 1"):
        side_by_side({"nothing": lambda: None}, 0)
    with pytest.raises(DavaeError, match="no function"):
        side_by_side({})
