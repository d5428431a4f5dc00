"""Child processes that are killed on purpose: quick to start, and never waited for in vain."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

LIMIT_S = 600.0  # no life of the tests takes a tenth of it

# Each child is a fork of a server that has imported torch and has one thread. A fork of the tests' own process
# would copy the locks that its other threads (progress bars, loaders) hold at that moment, and could wait for ever.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["davae.cli.main", "davae.training.runs.train", "davae.evaluation.generation.evaluate"]
)


def start(
    work: Callable[..., object], *arguments: object, log: Path, limit_s: float = LIMIT_S
) -> BaseProcess:
    """Run ``work(*arguments)`` in a child process on one thread, so that sums are made in the same order in all.

    What it prints is appended to ``log``. One that lives longer than ``limit_s`` seconds ends with status 1, and its
    log then says where every thread of it was.
    """
    process = _CONTEXT.Process(target=_live, args=(work, arguments, log, limit_s))
    process.start()
    return process


def finish(process: BaseProcess, log: Path) -> None:
    """Wait for a child that is to end well; what it printed is the error where it does not."""
    process.join()
    assert process.exitcode == 0, f"status {process.exitcode}: {log.read_text()}"


def _live(work: Callable[..., object], arguments: tuple[object, ...], log: Path, limit_s: float) -> None:
    torch.set_num_threads(1)
    with open(log, "a") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    faulthandler.dump_traceback_later(limit_s, exit=True)
    work(*arguments)
    faulthandler.cancel_dump_traceback_later()
