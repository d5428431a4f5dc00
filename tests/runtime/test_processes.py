"""What a launcher asks for: DeepSpeed is refused before anything starts."""

from collections.abc import Callable

import pytest
from accelerate.state import PartialState

from davae.errors import DavaeError
from davae.runtime.processes import start_processes
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
