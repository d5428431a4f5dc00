"""What a launcher asks for: DeepSpeed is refused before anything starts. What each process gets of the machine."""

import os
from collections.abc import Callable

import pytest
from accelerate.state import PartialState

from davae.errors import DavaeError
from davae.runtime.processes import loader_workers, start_processes
from davae.training.engine.fsdp import begin_accelerator


@pytest.mark.parametrize("start", [start_processes, lambda: begin_accelerator(cpu=True)])
def test_a_launcher_that_asks_for_deepspeed_is_told_of_fsdp2(
    start: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    before = dict(PartialState._shared_state)
    with pytest.raises(DavaeError, match=r"DeepSpeed.*fsdp2-zero2\.yaml.*fsdp2\.yaml"):
        start()
    assert dict(PartialState._shared_state) == before


@pytest.mark.parametrize(
    ("asked", "processors", "local", "found"),
    [(0, 64, None, 0), (3, 2, None, 3), (None, 64, None, 8), (None, 64, "16", 4), (None, 2, "4", 1)],
)
def test_workers_suit_the_processors_of_each_process(
    monkeypatch: pytest.MonkeyPatch, asked: int | None, processors: int, local: str | None, found: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(processors)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert loader_workers(asked) == found
