"""Ten kills, some of them while a checkpoint is written; `python -m tests.end_to_end.kills` does a hundred."""

from tests.end_to_end.kills import overrides_for, run_and_kill


def test_ten_kills_leave_no_trace(tmp_path):
    overrides = overrides_for("debug", 10)
    seen = run_and_kill("debug", overrides, 10, tmp_path)
    assert seen["kills"] == 10
    assert seen["while_writing"] >= 1  # of four attempts; how many hit depends on the machine
    assert seen["while_starting"] >= 1
    assert seen["broken_checkpoints"] == []
    assert seen["files"] > 4
    assert seen["differing"] == []
    assert seen["same_losses"]
