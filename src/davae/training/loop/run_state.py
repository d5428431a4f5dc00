"""What a checkpoint holds of a run, put together and put back.

Files hold whole tensors, named alike whether the run shards its weights or not: a run may go on with another number of
processes, and with FSDP where it began without.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.data import BatchStream
from davae.runtime.processes import all_the_same, everyone, is_first, wait_for_everyone
from davae.training.checkpoints.checkpoint import CheckpointWriter, newest_whole
from davae.training.engine.tensors import full_state_on_cpu
from davae.training.engine.trainer import ModuleTrainer
from davae.training.loop.averages import Ema, RunningMeans
from davae.training.loop.bad_steps import NonFiniteGuard

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """The stateful parts of a run.

    Args:
        trainers: of each the trained weights, buffers and moments are kept.
        ema: averages of the first module's weights.
        stream: position in the data.
        guard: counts of bad steps.
        window: losses since the last logged line.
        scaler: of the losses in fp16, or none.
    """

    trainers: list[ModuleTrainer]
    ema: Ema | None
    stream: BatchStream
    guard: NonFiniteGuard
    window: RunningMeans
    scaler: torch.amp.GradScaler | None

    def save(self, writer: CheckpointWriter, done: int, watched: float | None) -> None:
        """Begin to write a checkpoint in the first process; all ranks must call this.

        Args:
            writer: writes it.
            done: optimizer steps done.
            watched: the watched metric at this step, where it was measured.
        """
        if is_first():
            writer.wait()  # before the copy: two at a time would take twice the memory
        tensors = self._tensors(keep=is_first())
        window = self._mean_window()
        if is_first():
            values: dict[str, Any] = {
                "stream": self.stream.state_dict(),
                "window": window,
                "guard": {"skipped": self.guard.skipped, "in_a_row": 0}
                if self.guard.exhausted
                else self.guard.state_dict(),
            }
            if self.ema is not None:
                values["ema_updates"] = self.ema.updates
            if self.scaler is not None:
                values["scaler"] = self.scaler.state_dict()
            writer.save(done, tensors, values, watched=watched, copied=True)
        wait_for_everyone()

    def restore(self, checkpoints: Path) -> int:
        """Put the newest whole checkpoint back; returns its step, 0 where there is none.

        Every process reads the files and keeps what is its own.

        Raises:
            DavaeError: the processes did not find the same checkpoint.
        """
        modules = [trainer.trained.name for trainer in self.trainers]
        needed = [file for name in modules for file in (name, f"{name}_optimizer")]
        found = newest_whole(checkpoints, needed + ["averages"] * (self.ema is not None))
        all_the_same("the newest whole checkpoint", "none" if found is None else found[0].name, str(checkpoints))
        if found is None:
            return 0
        path, tensors, values = found
        for trainer in self.trainers:
            name = trainer.trained.name
            trainer.restore(tensors[name], tensors[f"{name}_optimizer"], path)
        if self.ema is not None:
            self.ema.restore(tensors["averages"], values["ema_updates"])
        self.stream.load_state_dict(values["stream"])
        self.guard.load_state_dict(values["guard"])
        self.window.load_state_dict(values.get("window", {}))  # absent in earlier versions, as the scaler is
        if self.scaler is not None and "scaler" in values:
            self.scaler.load_state_dict(values["scaler"])
        return int(values["step"])

    def _tensors(self, *, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Whole tensors on the CPU by file name; nothing in them unless ``keep``."""
        tensors = {}
        for trainer in self.trainers:
            name = trainer.trained.name
            tensors[name] = full_state_on_cpu(trainer.tensors(), keep=keep)
            tensors[f"{name}_optimizer"] = trainer.moments(keep=keep)
        if self.ema is not None:
            tensors["averages"] = full_state_on_cpu(self.ema.tensors(), keep=keep)
        return tensors

    def _mean_window(self) -> dict[str, list[float]]:
        """Sums and counts of the losses in the mean of the processes, of which there may be others later."""
        mean: dict[str, list[float]] = {}
        windows = everyone(self.window.state_dict())
        for own in windows:
            for name, pair in own.items():
                mean[name] = [a + b / len(windows) for a, b in zip(mean.get(name, [0.0, 0.0]), pair)]
        return mean
