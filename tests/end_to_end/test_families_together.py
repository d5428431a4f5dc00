"""Every family on two processes, with blocks that are compiled and recomputed: as one process learns without."""

import pytest
from tests.end_to_end import children
from tests.end_to_end.families import STEPS, train_all

from davae.bases.debug_pipelines import SMALL_PIPELINES
from davae.training.checkpoints.run_directory import read_metrics

NAMES = ["debug", *SMALL_PIPELINES]
BACKEND = "aot_eager"  # inductor's code takes minutes; what is traced, saved and recomputed is the same


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Losses of each step by family, on one process and on two."""
    out = tmp_path_factory.mktemp("families")
    train_all(NAMES, 4, None, out / "one")
    children.together(train_all, NAMES, 2, BACKEND, out / "two", log=out / "log")
    return [
        {name: [line["total"] for line in read_metrics(out / many / name / "metrics.jsonl")] for name in NAMES}
        for many in ("one", "two")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_that_compile_and_recompute_learn_what_one_does(runs, name):
    one, two = (run[name] for run in runs)
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=1e-4)
