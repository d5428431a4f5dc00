"""The training loop, one for every stage.

A :class:`Stage` says what is trained and what a step costs; :func:`train` does the rest: precision,
accumulation, clipping, averages, learning rates, metrics, validation, checkpoints and going on after a stop.

All randomness inside a step (noise, dropout, time) is drawn from generators seeded by
``(seed, step, micro-step)``. A run that stops and continues therefore sees what an uninterrupted one
would have seen, and ends with the same weights.
"""

from __future__ import annotations

import logging
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch import Tensor, nn

from davae.data import BatchStream, SkipLedger
from davae.data.stalls import is_of_a_dead_worker, told_dead_worker
from davae.errors import DavaeError
from davae.models.float32_islands import keep_linear_attention_in_float32
from davae.training.checkpoint import newest_whole
from davae.training.checkpoint_writer import CheckpointWriter
from davae.training.ema import Ema
from davae.training.guards import KeptBuffers, StepGuard, told_out_of_memory
from davae.training.module_state import module_tensors, optimizer_tensors, restore_module, restore_optimizer
from davae.training.optimizers import learning_rate, make_optimizer
from davae.training.progress import Progress
from davae.training.run_directory import RunDirectory
from davae.training.settings import LoopSettings, OptimizerSettings
from davae.training.shared_draws import SharedDraws
from davae.training.stopping import StopRequest, TrainingStopped
from davae.training.window import LossWindow

logger = logging.getLogger(__name__)

_LONGEST_WAIT = timedelta(hours=2)
"""For the first process, which validates and exports while the others wait. torch's own limit is ten minutes."""


@dataclass
class Player:
    """A module with its own optimizer. ``module(batch, step)`` gives named losses, among them ``total``."""

    name: str
    module: nn.Module
    optimizer: OptimizerSettings
    learning_rates: dict[str, float] = field(default_factory=dict)
    """Learning rates of parameters by exact name, where they differ from the optimizer's."""

    def trained(self) -> list[nn.Parameter]:
        """The parameters that learn."""
        return [p for p in self.module.parameters() if p.requires_grad]


class Stage(ABC):
    """What a training brings to the loop."""

    name: str
    loop: LoopSettings
    players: list[Player]
    """The first is the model (averaged, validated); a discriminator may follow."""
    dataset: torch.utils.data.Dataset[dict[str, Any]]
    workers: int = 0
    """Loader processes."""
    timeout_s: float = 0.0
    """Seconds to wait for a batch of images; 0 waits for ever."""
    facts: dict[str, Any] = {}  # replaced, never changed  # noqa: RUF012
    """What the run's ``environment.json`` says besides: where the base's weights came from."""

    @abstractmethod
    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """Measure the model on held-out images and write a picture into ``samples``."""

    @abstractmethod
    def export(self, out: Path) -> Path:
        """Write the result in diffusers format below ``out`` and return its folder."""

    def to(self, device: torch.device) -> None:  # noqa: B027 (most stages hold nothing else)
        """Move what the players do not hold (frozen models) to the device."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished training leaves."""

    out: Path
    result: Path
    steps: int
    metrics: dict[str, float]
    skipped: SkipLedger


def train(
    stage: Stage, out: Path, recipe: dict[str, Any], *, stop_after: int | None = None
) -> TrainResult | None:
    """Train a stage in the run directory ``out``, from its newest whole checkpoint where there is one.

    SIGINT and SIGTERM finish the step, save and raise :class:`TrainingStopped`; the same call continues.

    Args:
        stage: what to train.
        out: the run directory.
        recipe: the resolved recipe as plain values, kept beside the result.
        stop_after: leave after this many steps with a checkpoint and without a result, as an interrupted run
            does.

    Returns:
        The result, or none when ``stop_after`` ended the run early.

    Raises:
        DavaeError: the directory holds another run or one that is running, too many steps in a row were bad,
            the disk or the memory is full, or most images are unreadable.
        TrainingStopped: a signal asked for it.
    """
    try:
        return _Training(stage, out, recipe).run(stop_after)
    except torch.OutOfMemoryError as error:
        raise DavaeError(told_out_of_memory(stage.name, stage.loop)) from error
    except RuntimeError as error:
        if not is_of_a_dead_worker(error):
            raise
        raise DavaeError(f"{stage.name}: {told_dead_worker()}") from error


class _Training:
    """A stage, prepared: what its steps need beside the model."""

    def __init__(self, stage: Stage, out: Path, recipe: dict[str, Any]) -> None:
        self.stage, self.loop, self.out = stage, stage.loop, out
        loop = self.loop
        AcceleratorState._reset_state()  # one process may train several stages, each with its own precision
        self.accelerator = Accelerator(
            mixed_precision=loop.precision,
            log_with=loop.report_to or None,
            project_dir=str(out),
            cpu=_use_cpu(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
        )
        self.main = self.accelerator.is_main_process
        with self.accelerator.main_process_first():
            self.directory = RunDirectory(out, recipe, facts=stage.facts, write=self.main)
        self.metrics: dict[str, float] = {}

    def run(self, stop_after: int | None) -> TrainResult | None:
        """All steps that are left, then the result."""
        with ExitStack() as opened:
            if self.main:
                opened.enter_context(self.directory.locked())
            self._prepare()
            self.writer = opened.enter_context(
                CheckpointWriter(
                    self.directory.checkpoints,
                    keep=self.loop.checkpoints_total_limit,
                    best_mode=self.loop.best_mode,
                )
            )
            self.stop = opened.enter_context(StopRequest())
            finished = self._steps(self._resume(), stop_after)
            self.writer.wait()
            result = self._result() if finished else None
        for (
            tracker
        ) in self.accelerator.trackers:  # end_training would leave the other stages without processes
            tracker.finish()
        return result

    def _prepare(self) -> None:
        stage, loop, accelerator = self.stage, self.loop, self.accelerator
        if loop.report_to and self.main:
            accelerator.init_trackers("tracking")
        stage.to(accelerator.device)
        for player in stage.players:
            player.module.to(accelerator.device).train()  # loaded models come in eval mode
            keep_linear_attention_in_float32(player.module)
            if loop.channels_last:
                player.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.modules, self.optimizers = [], []
        for player in stage.players:
            optimizer = make_optimizer(player.name, player.module, player.optimizer, player.learning_rates)
            module, optimizer = accelerator.prepare(player.module, optimizer)
            self.modules.append(module)
            self.optimizers.append(optimizer)
        self.ema = Ema(stage.players[0].trained(), loop.ema_decay) if loop.ema_decay is not None else None
        self.stream = BatchStream(
            stage.dataset,
            loop.batch_size,
            seed=loop.seed,
            workers=stage.workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            timeout_s=stage.timeout_s,
        )
        self.ledger = SkipLedger.for_dataset(stage.dataset)
        self.window = LossWindow()
        self.guard = StepGuard(stage.name, loop, self.out)

    def _steps(self, start: int, stop_after: int | None) -> bool:
        """The loop. Returns whether it went to its end."""
        loop = self.loop
        batches = iter(self.stream)
        with Progress(self.stage.name, loop.steps, start, enabled=self.main) as progress:
            for step in range(start, loop.steps):
                batch = self._step(step, batches)
                done = step + 1
                stopping = done == stop_after or self._asked_to_stop(done)
                due = done % loop.log_every == 0 or done == loop.steps
                if due or stopping or self.accelerator.device.type == "cpu":
                    self._guard(done, batch)
                if due:
                    progress.losses(self._log(done))
                watched, best = None, False
                if done == loop.steps or (loop.validate_every and done % loop.validate_every == 0):
                    watched, best = self._validate(done)
                if done % loop.checkpoint_every == 0 or done == loop.steps or stopping or best:
                    self._guard(done, batch)
                    self._save(done, watched)
                self.writer.check()
                progress.advance()
                if stopping and done < loop.steps:
                    if self.stop.received is not None:
                        self.writer.wait()
                        raise TrainingStopped(self.stage.name, done, loop.steps, self.out, self.stop.received)
                    return False
        return True

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """One optimizer step of every player; returns the last batch."""
        loop, accelerator = self.loop, self.accelerator
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        kept = [KeptBuffers(player.module) for player in self.stage.players]
        losses: list[list[dict[str, Tensor]]] = [[] for _ in self.modules]
        ids: list[str] = []
        for micro in range(loop.gradient_accumulation):
            batch = next(batches)
            self.ledger.add(batch.pop("skipped", []))
            ids += batch.get("id", [])
            last = micro == loop.gradient_accumulation - 1
            batch = to_device(batch, accelerator.device)
            for i, module in enumerate(self.modules):
                _seed_step(loop.seed, step, micro)
                synced = nullcontext() if last else accelerator.no_sync(module)
                with synced, accelerator.autocast(), self._draws():
                    losses[i].append(module(batch, step))
                accelerator.backward(losses[i][-1]["total"] / loop.gradient_accumulation)
        for i, (player, optimizer) in enumerate(zip(self.stage.players, self.optimizers)):
            for part in losses[i]:
                self.window.add(part, "" if i == 0 else player.name)
            rate = learning_rate(player.optimizer, step, loop.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["rate_factor"]
            good = self._judge(step + 1, player, optimizer, losses[i], ids, log_norm=i == 0)
            kept[i].restore_unless(good)
            if loop.precision != "fp16":  # there the gradient scaler does the same
                optimizer.optimizer.found_inf = (~good).float()  # read by the fused optimizer, on the device
            optimizer.step()
        if self.ema is not None:
            self.ema.update()
        return batch

    def _draws(self) -> AbstractContextManager[Any]:
        world = self.accelerator.num_processes
        if world == 1:
            return nullcontext()
        return SharedDraws(self.accelerator.process_index, world, self.loop.batch_size)

    def _judge(
        self,
        done: int,
        player: Player,
        optimizer: Any,
        losses: list[dict[str, Tensor]],
        ids: list[str],
        *,
        log_norm: bool,
    ) -> Tensor:
        norm = None
        self.accelerator.unscale_gradients(optimizer)
        if self.loop.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(player.trained(), self.loop.max_grad_norm)
            if log_norm:
                self.window.add({"gradient_norm": norm})
        good = self.guard.judge(done, player.name, player.module, losses, ids, norm)
        if self.accelerator.num_processes > 1:  # all leave the step out, or none
            votes = self.accelerator.reduce(good.float(), "sum")
            good = votes >= self.accelerator.num_processes
        return good

    def _guard(self, done: int, batch: dict[str, Any]) -> None:
        self.guard.read()
        if self.guard.exhausted:
            self._save(done, None)
            self.writer.wait()
            self.guard.give_up(batch)

    def _asked_to_stop(self, done: int) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop.received is not None
        if done % self.loop.log_every:  # agreed where the processes meet anyway
            return False
        asked = torch.tensor(float(self.stop.received is not None), device=self.accelerator.device)
        if not float(self.accelerator.reduce(asked, "sum")):
            return False
        self.stop.received = self.stop.received or signal.SIGTERM
        return True

    def _log(self, done: int) -> dict[str, float]:
        names, sums = self.window.tensors()
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        values = self.window.means(names, sums)
        values["learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
        if self.guard.skipped:
            values["skipped_steps"] = self.guard.skipped
        if self.main:
            self.directory.write_metrics(done, values)
            self.accelerator.log(values, step=done)
        return values

    def _validate(self, done: int) -> tuple[float | None, bool]:
        """Measure in the first process; returns, in all, the watched metric and whether it was never better."""
        watched = self._measure(done) if self.main else None
        found = [watched, watched is not None and self.writer.is_best(watched)]
        if self.accelerator.num_processes > 1 and self.loop.best_metric is not None:
            broadcast_object_list(found)  # all save the best, or none
        return found[0], bool(found[1])

    def _evaluate(self, done: int) -> None:
        """Validate with the averaged weights, as the result will be used."""
        model = self.stage.players[0].module
        model.eval()
        with self.ema.applied() if self.ema is not None else nullcontext(), torch.no_grad():
            self.metrics = self.stage.validate(self.directory.samples, done)
        model.train()

    def _measure(self, done: int) -> float | None:
        self._evaluate(done)
        self.directory.write_metrics(done, self.metrics)
        self.accelerator.log(self.metrics, step=done)
        best = self.loop.best_metric
        if best is None:
            return None
        if best not in self.metrics:
            raise DavaeError(
                f"loop.best_metric is '{best}', which {self.stage.name} does not measure; it measures "
                f"{', '.join(self.metrics)}"
            )
        return self.metrics[best]

    def _save(self, done: int, watched: float | None) -> None:
        self._merge_ledgers()
        if self.main:
            tensors = {}
            for player, optimizer in zip(self.stage.players, self.optimizers):
                tensors[player.name] = module_tensors(player.module)
                tensors[f"{player.name}_optimizer"] = optimizer_tensors(optimizer)
            values: dict[str, Any] = {
                "stream": self.stream.state_dict(),
                "skipped": self.ledger.state_dict(),
                "guard": {"skipped": self.guard.skipped, "in_a_row": 0}
                if self.guard.exhausted
                else self.guard.state_dict(),
            }
            if self.ema is not None:
                tensors["averages"] = {str(i): a for i, a in enumerate(self.ema.averages)}
                values["ema_updates"] = self.ema.updates
            self.writer.save(done, tensors, values, watched=watched)
        self.accelerator.wait_for_everyone()

    def _merge_ledgers(self) -> None:
        """Every process met bad files of its own; afterwards each knows all."""
        if self.accelerator.num_processes > 1:
            for state in gather_object([self.ledger.state_dict()]):
                self.ledger.load_state_dict(state)

    def _resume(self) -> int:
        """Put the newest whole checkpoint back; returns its step, 0 where there is none."""
        found = newest_whole(self.directory.checkpoints)
        if found is None:
            return 0
        path, tensors, values = found
        for player, optimizer in zip(self.stage.players, self.optimizers):
            restore_module(player.module, tensors[player.name], path)
            restore_optimizer(optimizer, tensors[f"{player.name}_optimizer"])
        if self.ema is not None:
            self.ema.updates = values["ema_updates"]
            for i, average in enumerate(self.ema.averages):
                average.copy_(tensors["averages"][str(i)])
        self.stream.load_state_dict(values["stream"])
        self.ledger.load_state_dict(values["skipped"])
        self.guard.load_state_dict(values["guard"])
        step = int(values["step"])
        logger.info("%s continues from step %d", self.stage.name, step)
        if self.main:
            self.directory.forget_metrics_after(step)
        return step

    def _result(self) -> TrainResult:
        self._merge_ledgers()
        self.ledger.check()
        result = self.out
        if (
            self.main and not self.metrics
        ):  # the run had ended before: measure again rather than report nothing
            self._evaluate(self.loop.steps)
        if self.main:
            with self.ema.applied() if self.ema is not None else nullcontext():
                result = self.stage.export(self.out)
        facts: list[Any] = [result, self.metrics]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(facts)  # also keeps the others from reading what is not yet written
        result, self.metrics = facts
        if self.ledger.count and self.main:
            logger.warning(self.ledger.summary())
        return TrainResult(self.out, result, self.loop.steps, self.metrics, self.ledger)


def _seed_step(seed: int, step: int, micro: int) -> None:
    """Seed torch's generators so that a step's draws depend on nothing that came before it.

    All processes seed alike; see :class:`SharedDraws`.
    """
    mixed = torch.Generator().manual_seed(seed * 1_000_003 + step)
    base = int(torch.randint(2**62, (), generator=mixed))
    torch.manual_seed(base + 1_009 * micro)


def to_device(value: Any, device: torch.device) -> Any:
    """A batch with its tensors, also those in dictionaries, on the device."""
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def _use_cpu() -> bool:
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()
