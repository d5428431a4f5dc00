"""The state of a run: collected for a checkpoint, and restored from one.

Files hold whole tensors under the same names whether the run shards its weights or not: a run may resume with another
number of processes, and with or without FSDP.
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
from davae.training.checkpoints.foundations import IMAGES, Foundations, stands_on
from davae.training.engine.tensors import full_state_on_cpu
from davae.training.engine.trainer import ModuleTrainer
from davae.training.loop.averages import Ema, RunningMeans
from davae.training.loop.bad_steps import NonFiniteGuard

logger = logging.getLogger(__name__)


@dataclass
class RunState:
    """The stateful parts of a run.

    Args:
        trainers: their trained weights, buffers and optimizer states are saved.
        ema: averages of the first module's weights, or ``None``.
        stream: position in the data.
        guard: counts of bad steps.
        window: losses since the last logged line.
        scaler: of the losses in fp16, or none.
        foundations: what the run depends on; a checkpoint with others is refused.
        held_out: names of images that are held out or unusable now; other images of the checkpoint must not be gone.
    """

    trainers: list[ModuleTrainer]
    ema: Ema | None
    stream: BatchStream
    guard: NonFiniteGuard
    window: RunningMeans
    scaler: torch.amp.GradScaler | None
    foundations: Foundations
    held_out: set[str]

    def save(self, writer: CheckpointWriter, done: int) -> None:
        """Write a checkpoint in the first process; all ranks must call this.

        From a device it is copied, and written while the training goes on; in main memory it is written from where it
        is.

        Args:
            writer: writes the checkpoint.
            done: optimizer steps done.
        """
        if is_first():
            writer.wait()  # before copying: two copies would take twice the memory
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
            values["stands_on"] = dict(self.foundations.weights)
            values["trained"] = {trainer.trained.name: trainer.order for trainer in self.trainers}
            tensors[IMAGES] = dict(self.foundations.images)
            if self.ema is not None:
                values["ema_updates"] = int(self.ema.updates)
            if self.scaler is not None:
                values["scaler"] = self.scaler.state_dict()
            writer.save(done, tensors, values)
            if self.trainers[0].accelerator.device.type == "cpu":
                writer.wait()  # these are no copies: the next step would change them
        wait_for_everyone()

    def restore(self, checkpoints: Path) -> int:
        """Restore the newest whole checkpoint; returns its step, or 0 if there is none.

        Every process reads the files and keeps its own part.

        Raises:
            DavaeError: none is whole, the processes found different ones, or it depends on other weights or images.
        """
        modules = [trainer.trained.name for trainer in self.trainers]
        needed = [file for name in modules for file in (name, f"{name}_optimizer")]
        found = newest_whole(checkpoints, needed + ["averages"] * (self.ema is not None))
        all_the_same("the newest whole checkpoint", "none" if found is None else found[0].name, str(checkpoints))
        if found is None:
            return 0
        path, tensors, values = found
        known, grown = stands_on(values), False
        if known is not None and IMAGES in tensors:
            grown = self.foundations.check(known, tensors[IMAGES], self.held_out, checkpoints.parent)
        for trainer in self.trainers:
            name = trainer.trained.name
            order = values.get("trained", {}).get(name)
            trainer.restore(tensors[name], tensors[f"{name}_optimizer"], path, order)
        if self.ema is not None:
            self.ema.restore(tensors["averages"], values["ema_updates"])
        self.stream.load_state_dict(values["stream"], grown=grown)
        self.guard.load_state_dict(values["guard"])
        self.window.load_state_dict(values.get("window", {}))  # earlier versions saved neither it nor the scaler
        if self.scaler is not None and "scaler" in values:
            self.scaler.load_state_dict(values["scaler"])
        return int(values["step"])

    def _tensors(self, *, keep: bool) -> dict[str, dict[str, Tensor]]:
        """Whole tensors on the CPU by file name; empty dictionaries unless ``keep``."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for trainer in self.trainers:
            name = trainer.trained.name
            tensors[name] = full_state_on_cpu(trainer.tensors(), keep=keep)
            tensors[f"{name}_optimizer"] = trainer.moments(keep=keep)
        if self.ema is not None:
            tensors["averages"] = full_state_on_cpu(self.ema.tensors(), keep=keep)
        return tensors

    def _mean_window(self) -> dict[str, list[float]]:
        """Sums and counts of the losses averaged over processes, whose number may change on resume."""
        mean: dict[str, list[float]] = {}
        windows = everyone(self.window.state_dict())
        for own in windows:
            for name, pair in own.items():
                mean[name] = [a + b / len(windows) for a, b in zip(mean.get(name, [0.0, 0.0]), pair)]
        return mean
