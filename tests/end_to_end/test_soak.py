"""Twenty seconds of what `python -m tests.end_to_end.soak` does in thirty minutes; memory and open files only."""

import sys

import pytest
from tests.end_to_end.soak import Sample, check, overrides_for, soak, write_shards


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_grows_in_twenty_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shards = write_shards(tmp_path / "shards", 60, side=40, a_shard=20)
    seen = soak("debug", overrides_for("debug", shards, 0), 20, tmp_path / "run", every=0.2)
    assert seen["steps"] > 5
    assert seen["memory_flat"], seen
    assert seen["files_constant"], seen


def _samples(memory=lambda t: 10**9, files=lambda t: 20, step=lambda t: 5 * t):
    return [Sample(float(t), memory(t), files(t), step(t)) for t in range(101)]


def test_the_judge_sees_what_grows():
    fine = check(_samples())
    assert (fine["memory_spread"], fine["throughput_spread"], fine["files"]) == (0, 0, [20] * 8)
    assert fine["memory_flat"]
    assert fine["throughput_flat"]
    assert fine["files_constant"]
    assert not check(_samples(memory=lambda t: 10**9 + t * 10**6))["memory_flat"]
    assert not check(_samples(files=lambda t: 20 + t // 50))["files_constant"]
    assert not check(_samples(step=lambda t: 5 * t if t < 60 else 300 + 4 * (t - 60)))["throughput_flat"]
    # one tall sample, such as while a checkpoint is copied, is not growth; nor is the warm-up
    assert check(_samples(memory=lambda t: 10**9 * (2 if t == 50 else 1)))["memory_flat"]
    assert check(_samples(memory=lambda t: 10**9 // (2 if t < 15 else 1)))["memory_flat"]
