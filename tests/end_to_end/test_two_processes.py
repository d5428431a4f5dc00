"""What two processes must agree on besides gradients: which files were bad, and when the best checkpoint is saved."""

import json
import os
import subprocess
import sys

from davae.training.checkpoint import checkpoints, load_checkpoint


def test_bad_files_of_all_processes_are_counted_and_the_best_is_saved_together(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", "-m", "tests.end_to_end.two_processes", str(tmp_path)]
    done = subprocess.run(
        launch,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    everything = [["0.png", "damaged"], ["4.png", "damaged"], ["8.png", "damaged"]]
    facts = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for found in facts:
        assert found["skipped"] == everything
    epoch = [int(i) for found in facts for i in found["seen"][:6]]  # of 12 images, in 8 steps
    assert sorted(epoch) == list(range(12))
    assert done.stderr.count("3 files were skipped") == 1
    kept = checkpoints(tmp_path / "checkpoints")
    assert [p.name for p in kept][-1] == "step-8"
    assert "step-3" in [p.name for p in kept]
    assert load_checkpoint(kept[-1])[1]["skipped"]["skipped"] == everything
