"""What a checkpoint holds of a run, put together and put back.

Files hold whole tensors, named alike whether the run shards its weights or not: a run may go on with another number of
processes, and with FSDP where it began without.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from davae.data import BatchStream, SkipLedger
from davae.training.checkpoint import newest_whole
from davae.training.checkpoint_writer import CheckpointWriter
from davae.training.ema import Ema
from davae.training.guards import StepGuard
from davae.training.module_state import module_tensors, optimizer_tensors, restore_module, restore_optimizer
from davae.training.processes import is_first, rank_and_world, wait_for_everyone
from davae.training.sharded_tensors import whole_on_cpu

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """The stateful parts of a run.

    Args:
        modules: by player's name; of each the trained weights and buffers are kept.
        optimizers: by player's name.
        ema: averages of the first player's weights.
        stream: position in the data.
        ledger: images that could not be read.
        guard: counts of bad steps.
    """

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    ema: Ema | None
    stream: BatchStream
    ledger: SkipLedger
    guard: StepGuard

    def save(self, writer: CheckpointWriter, done: int, watched: float | None) -> None:
        """Begin to write a checkpoint in the first process; every process must come along.

        Args:
            writer: writes it.
            done: optimizer steps done.
            watched: the watched metric at this step, where it was measured.
        """
        self.merge_ledgers()
        if is_first():
            writer.wait()  # before the copy: two at a time would take twice the memory
        tensors = {name: whole_on_cpu(t, keep=is_first()) for name, t in self._tensors().items()}
        if is_first():
            values: dict[str, Any] = {
                "stream": self.stream.state_dict(),
                "skipped": self.ledger.state_dict(),
                "guard": {"skipped": self.guard.skipped, "in_a_row": 0}
                if self.guard.exhausted
                else self.guard.state_dict(),
            }
            if self.ema is not None:
                values["ema_updates"] = self.ema.updates
            writer.save(done, tensors, values, watched=watched, copied=True)
        wait_for_everyone()

    def restore(self, checkpoints: Path) -> int:
        """Put the newest whole checkpoint back; returns its step, 0 where there is none.

        Every process reads the files and keeps what is its own.
        """
        found = newest_whole(checkpoints)
        if found is None:
            return 0
        path, tensors, values = found
        for name, module in self.modules.items():
            restore_module(module, tensors[name], path)
            restore_optimizer(self.optimizers[name], tensors[f"{name}_optimizer"])
        if self.ema is not None:
            self.ema.restore(tensors["averages"], values["ema_updates"])
        self.stream.load_state_dict(values["stream"])
        self.ledger.load_state_dict(values["skipped"])
        self.guard.load_state_dict(values["guard"])
        return int(values["step"])

    def merge_ledgers(self) -> None:
        """Every process met bad files of its own; afterwards each knows all."""
        if rank_and_world()[1] > 1:
            for state in gather_object([self.ledger.state_dict()]):
                self.ledger.load_state_dict(state)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """By file name; sharded ones as they are."""
        tensors = {}
        for name, module in self.modules.items():
            tensors[name] = module_tensors(module)
            tensors[f"{name}_optimizer"] = optimizer_tensors(self.optimizers[name])
        if self.ema is not None:
            tensors["averages"] = self.ema.tensors()
        return tensors
