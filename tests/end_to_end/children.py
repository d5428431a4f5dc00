"""Child processes that are killed on purpose or train together: quick to start, and never waited for in vain."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from davae.cli.main import main

LIMIT_S = 600.0  # no life of the tests takes a tenth of it

# Each child is a fork of a server that has imported torch and has one thread. A fork of the tests' own process
# would copy the locks that its other threads (progress bars, loaders) hold at that moment, and could wait for ever.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["davae.cli.main", "davae.training.runs.train", "davae.evaluation.generation.evaluate"])


def start(work: Callable[..., object], *arguments: object, log: Path, limit_s: float = LIMIT_S) -> BaseProcess:
    """Run ``work(*arguments)`` in a child process on one thread, so that sums are made in the same order in all.

    What it prints is appended to ``log``. One that lives longer than ``limit_s`` seconds ends with status 1, and its
    log then says where every thread of it was.
    """
    process = _CONTEXT.Process(target=_live, args=(work, arguments, log, limit_s))
    process.start()
    return process


def together(
    work: Callable[..., object],
    *arguments: object,
    log: Path,
    environment: Mapping[str, str] | None = None,
    processes: int = 2,
) -> str:
    """Run ``work(*arguments)`` in child processes that find each other as those of torchrun do; what they printed.

    ``environment`` is set in each before it begins. Where one fails the others are ended, and the error is what they
    printed.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(processes):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        places |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        own = {**(environment or {}), **{name: str(value) for name, value in places.items()}}
        started.append(start(_with_environment, own, work, *arguments, log=log))
    running = {process.sentinel: process for process in started}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode:
                for other in running.values():
                    other.kill()
                raise AssertionError(f"status {process.exitcode}: {log.read_text()[-9000:]}")
    return log.read_text()


def davae(words: list[str]) -> None:
    """The command line ``davae train ...``, given as its words; a status other than 0 is the child's."""
    sys.argv = words
    main()


def _with_environment(environment: Mapping[str, str], work: Callable[..., object], *arguments: object) -> None:
    os.environ.update(environment)
    work(*arguments)


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
