"""What two processes must agree on besides gradients: bad files and steps, when the best is saved, where to go on."""

import json

import pytest
from tests.end_to_end import children, two_processes

from davae.training.checkpoints.checkpoint import checkpoints, load_checkpoint


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the run, what each process saw, and what they printed."""
    tmp_path = tmp_path_factory.mktemp("two")
    told = children.together(two_processes.main, tmp_path, log=tmp_path / "log")
    return tmp_path, [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)], told


def test_bad_files_of_all_processes_are_counted_and_the_best_is_saved_together(ran):
    folder, facts, message = ran
    everything = [["0.png", "damaged"], ["4.png", "damaged"], ["8.png", "damaged"]]
    for found in facts:
        assert found["skipped"] == everything
    epoch = [int(i) for found in facts for i in found["seen"][:6]]  # of 12 images, in 8 steps
    assert sorted(epoch) == list(range(12))
    assert message.count("3 files were skipped") == 2  # two runs came to their end; the first process tells
    kept = checkpoints(folder / "checkpoints")
    assert [p.name for p in kept][-1] == "step-8"
    assert "step-3" in [p.name for p in kept]
    assert "skipped" not in load_checkpoint(kept[-1])[1]  # a run that goes on asks the files again


def test_a_run_directory_that_only_one_of_them_sees_is_refused_by_both(ran):
    """Each would go on from a step of its own, and average gradients of other weights."""
    for found in ran[1]:
        assert "process 0: step-8; process 1: none" in found["apart"]


def test_a_signal_to_one_of_them_after_the_last_step_stops_both(ran):
    """What comes next needs both, so it must not begin in one."""
    for found in ran[1]:
        assert "stopped by SIGTERM after step 8 of 8; its result is written" in found["signalled"]


def test_a_step_that_one_finds_bad_is_bad_in_both(ran):
    """A figure that is only shown, and not finite in the second process alone: no gradient tells the first."""
    folder, facts, _ = ran
    for found in facts:
        assert "3 steps in a row" in found["poisoned"]
    reasons = [
        {json.loads(line)["reason"] for line in (folder / "poisoned" / name).read_text().splitlines()}
        for name in ("skipped_steps.jsonl", "skipped_steps.rank-1.jsonl")
    ]
    assert reasons == [{"another process found it bad"}, {"loss 'shown' is not finite"}]
    assert (folder / "poisoned" / "failure" / "batch.safetensors").is_file()
    assert (folder / "poisoned" / "failure" / "rank-1" / "batch.safetensors").is_file()
