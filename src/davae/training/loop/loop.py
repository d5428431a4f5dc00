"""The training loop that all stages share.

A :class:`Stage` defines modules, losses and data; :func:`train` does the rest: precision, gradient accumulation,
clipping, averages, learning rates, metrics, validation, checkpoints and resuming.

Random numbers within a step (noise, time steps, dropout) come from torch's generators, seeded by
``(seed, step, micro-step)``. A run that is stopped and resumed therefore draws the same numbers as an uninterrupted
one, and ends with the same weights.
"""

import itertools
import logging
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from torch import Tensor

from davae.data import BatchStream, ItemDataset, SkipLedger, as_item_dataset
from davae.data.loading.watchdog import dead_worker_message, is_of_a_dead_worker
from davae.errors import DavaeError
from davae.evaluation.metrics.names import current_name
from davae.recipes.checks import check_trackers
from davae.runtime.atomic_files import disk_full_as_error
from davae.runtime.processes import LONGEST_WAIT, all_the_same, everyone, use_cpu
from davae.runtime.progress import Progress
from davae.training.checkpoints.checkpoint import CheckpointWriter
from davae.training.checkpoints.foundations import Foundations
from davae.training.checkpoints.run_directory import RunDirectory, read_metrics
from davae.training.engine.fsdp import begin_accelerator, is_sharding, unshard_for_good, unsharded
from davae.training.engine.optimizer import learning_rate
from davae.training.engine.trainer import prepare
from davae.training.loop.averages import Ema, RunningMeans
from davae.training.loop.bad_steps import BatchNormSnapshot, NonFiniteGuard, out_of_memory_message
from davae.training.loop.rng import RankInvariantDraws, _seed_step, draws_by
from davae.training.loop.run_state import RunState
from davae.training.loop.signals import StopRequest, TrainingStopped
from davae.training.loop.trackers import Trackers
from davae.training.stage import Stage

logger = logging.getLogger(__name__)


def figures_line(metrics: Mapping[str, float]) -> str:
    """Metrics in one line of the terminal."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())


@dataclass(frozen=True)
class TrainResult:
    """A finished training: run directory, the result's folder, steps, metrics of the last validation, skipped files."""

    out: Path
    result: Path
    steps: int
    metrics: dict[str, float]
    skipped: SkipLedger


def train(stage: Stage, out: Path, recipe: dict[str, Any], *, stop_after: int | None = None) -> TrainResult | None:
    """Train a stage in the run directory ``out``, from its newest whole checkpoint if there is one.

    On SIGINT, SIGTERM, SIGHUP or SIGUSR1 the loop finishes the step (with several processes, the steps up to the next
    log line), saves and raises :class:`TrainingStopped`; the same call resumes. After the last step it writes the
    result first and raises nevertheless, so that a following training does not start.

    Args:
        stage: what to train.
        out: the run directory.
        recipe: the resolved recipe as plain values, stored in ``config.yaml``.
        stop_after: stop once this many steps are done, with a checkpoint but without a result.

    Returns:
        The result, or ``None`` if ``stop_after`` ended the run early.

    Raises:
        DavaeError: the directory holds another run or is in use, the weights or images it depends on have changed, too
            many steps in a row (or all) were bad, the disk or the device's memory is full, a data loader process died,
            or most images are unreadable.
        TrainingStopped: a signal asked for it.
    """
    try:
        with disk_full_as_error(out, "Its checkpoints are whole"):
            return _Training(stage, out, recipe).run(stop_after)
    except torch.OutOfMemoryError as error:
        raise DavaeError(out_of_memory_message(stage)) from error
    except RuntimeError as error:
        if not is_of_a_dead_worker(error):
            raise
        raise DavaeError(f"{stage.name}: {dead_worker_message()}") from error


def steps_of(stage: Stage, out: Path) -> Callable[[], None]:
    """A function that makes the next step of a stage as :func:`train` does, data loading included, without saving.

    For benchmarks and profiles.

    Args:
        stage: what to train.
        out: an empty folder.
    """
    training = _Training(stage, out, {})
    training._prepare()
    batches, steps = iter(training.stream), itertools.count()

    def step() -> None:
        number = next(steps)
        batch = training._step(number, batches)
        if training.accelerator.device.type == "cpu":
            training._guard(number + 1, batch)

    return step


class _Training:
    """One training of a stage, and the state of its loop."""

    def __init__(self, stage: Stage, out: Path, recipe: dict[str, Any]) -> None:
        self.stage, self.loop, self.out = stage, stage.loop, out
        loop = self.loop
        check_trackers(loop, stage.section)
        self.accelerator = begin_accelerator(
            mixed_precision=loop.precision,
            cpu=use_cpu(),
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
        self.main = self.accelerator.is_main_process
        self.directory = RunDirectory(out, recipe, facts=stage.facts, other_sections=stage.other_sections)
        self.trackers = Trackers(loop, out, recipe, stage.section, enabled=self.main)
        self.metrics: dict[str, float] = {}

    def run(self, stop_after: int | None) -> TrainResult | None:
        """Make the remaining steps, then the result."""
        with ExitStack() as opened:
            if self.main:
                opened.enter_context(self.directory.locked())
            self._prepare()
            self.writer = opened.enter_context(
                CheckpointWriter(
                    self.directory.checkpoints,
                    keep=self.loop.checkpoints_total_limit,
                    best_metric=self.loop.best_metric,
                    best_mode=self.loop.best_mode,
                )
            )
            self.stop = opened.enter_context(StopRequest(quiet=not self.main))
            opened.callback(self.trackers.finish)
            finished = self._steps(self._resume(), stop_after)
            self.writer.wait()
            result = self._result() if finished else None
        if result is not None and self._signal() is not None:
            raise self._stopped(self.loop.steps, result.result)
        return result

    def _stopped(self, done: int, result: Path | None = None) -> TrainingStopped:
        assert self.stop.received is not None
        return TrainingStopped(self.stage.name, done, self.loop.steps, self.out, self.stop.received, result=result)

    def _prepare(self) -> None:
        stage, loop, accelerator = self.stage, self.loop, self.accelerator
        stage.to(accelerator.device)
        self.trainers = [
            prepare(accelerator, loop, trained, is_model=trained is stage.modules[0]) for trained in stage.modules
        ]
        if loop.offload_ema and is_sharding(accelerator):
            key = f"{stage.section}.loop.offload_ema".lstrip(".")
            raise DavaeError(f"{key} does not work with FSDP, which shards averages too: set {key}=false")
        where = "cpu" if loop.offload_ema else None
        decay = loop.ema_decay
        self.ema = None if decay is None else Ema(stage.modules[0].parameters(), decay, device=where)
        self.dataset = as_item_dataset(stage.dataset)
        self.stream = BatchStream(
            self.dataset,
            loop.batch_size,
            seed=loop.seed,
            workers=stage.workers,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            timeout_s=stage.timeout_s,
        )
        if accelerator.num_processes > 1:
            all_the_same("the images", _described(self.dataset), "the data")
        self.ledger = SkipLedger.for_dataset(self.dataset)
        self.means = RunningMeans(accelerator.device)
        self.guard = NonFiniteGuard(stage.name, loop, self.out, section=stage.section)
        self.state = RunState(
            trainers=self.trainers,
            ema=self.ema,
            stream=self.stream,
            guard=self.guard,
            window=self.means,
            scaler=accelerator.scaler,
            foundations=Foundations.of(stage.foundations, self.dataset),
            held_out={images.id(i) for images in stage.measured_on or () for i in range(len(images))}
            | {name for name, _ in self.dataset.skipped},
        )

    def _steps(self, start: int, stop_after: int | None) -> bool:
        """The loop. Returns whether it reached the last step."""
        loop = self.loop
        batches = iter(self.stream)
        images = loop.batch_size * loop.gradient_accumulation * self.accelerator.num_processes
        with Progress(self.stage.name, loop.steps, start, images=images, enabled=self.main) as progress:
            for step in range(start, loop.steps):
                batch = self._step(step, batches)
                done = step + 1
                stopping = done == stop_after or self._asked_to_stop(done)
                due = done % loop.log_every == 0 or done == loop.steps
                if due or stopping or self.accelerator.device.type == "cpu":
                    self._guard(done, batch)
                if due:
                    progress.losses(self._log(done))
                saved = done % loop.checkpoint_every == 0 or done == loop.steps or stopping
                if saved:  # first, so that nothing is lost if validation fails
                    self._guard(done, batch)
                    self.state.save(self.writer, done)
                if self._validates(done):
                    self._validate(done, saved=saved)
                self.writer.check()
                progress.advance()
                if stopping and done < loop.steps:
                    if self.stop.received is not None:
                        self.writer.wait()
                        raise self._stopped(done)
                    return False
        return True

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        """One optimizer step of every trained module; returns the last batch."""
        loop, accelerator = self.loop, self.accelerator
        kept = [BatchNormSnapshot(trained.module) for trained in self.stage.modules]
        losses: list[list[dict[str, Tensor]]] = [[] for _ in self.trainers]
        ids: list[str] = []
        finite: list[Tensor] = []

        # Gradients of every module, accumulated over the micro-steps; the same random numbers for each module.
        for micro in range(loop.gradient_accumulation):
            batch = next(batches)
            self.ledger.add(batch.pop("skipped", []))
            ids += batch.get("id", [])
            last = micro == loop.gradient_accumulation - 1
            batch = to_device(batch, accelerator.device)
            if "latent" in batch:
                finite.append(batch["latent"].isfinite().flatten(1).all(1))
            for i, trainer in enumerate(self.trainers):
                _seed_step(loop.seed, step, micro)
                with draws_by(self._draws()):
                    losses[i].append(trainer.losses(batch, step, last=last))
                trainer.backward(losses[i][-1]["total"] / loop.gradient_accumulation)

        # Masks, clipping, and the gradient norm for the next log line.
        for trainer in self.trainers:
            trainer.mask()
        norms = [trainer.clip() for trainer in self.trainers]
        if norms[0] is not None:
            self.means.add({"gradient_norm": norms[0]})

        # The optimizer steps; a bad one changes nothing, in any process.
        latents = torch.cat(finite) if finite else None
        for i, trainer in enumerate(self.trainers):
            trained = trainer.trained
            for part in losses[i]:
                self.means.add(part, "" if i == 0 else trained.name)
            good = self.guard.check(
                step + 1, trained.name, losses[i], ids, trainer.names, trainer.norms(), norms[i], self._agreed, latents
            )
            kept[i].restore_unless(good)
            trainer.step(learning_rate(trained.optimizer, step, loop.steps), good)
            if i == 0 and self.ema is not None:
                self.ema.update(good)
        for trainer in self.trainers:  # validation and checkpoints need the memory
            trainer.zero_grad()
        if accelerator.scaler is not None:
            accelerator.scaler.update()
        return batch

    def _draws(self) -> RankInvariantDraws | None:
        world = self.accelerator.num_processes
        if world == 1:
            return None
        return RankInvariantDraws(self.accelerator.process_index, world, self.loop.batch_size)

    def _agreed(self, good: Tensor) -> Tensor:
        """Whether a step is good in all processes; otherwise all skip it."""
        if self.accelerator.num_processes == 1:
            return good
        votes: Tensor = self.accelerator.reduce(good.float(), "sum")
        return votes >= self.accelerator.num_processes

    def _guard(self, done: int, batch: dict[str, Any]) -> None:
        self.guard.read()
        if self.guard.exhausted:
            self.state.save(self.writer, done)
            self.writer.wait()
            self.guard.give_up(batch)

    def _asked_to_stop(self, done: int) -> bool:
        if self.accelerator.num_processes > 1 and done % self.loop.log_every:
            return False  # processes agree only at log lines, where they synchronise anyway
        return self._signal() is not None

    def _signal(self) -> signal.Signals | None:
        """The signal that any process received, or ``None``; all ranks must call this."""
        if self.accelerator.num_processes == 1:
            return self.stop.received
        asked = torch.tensor(float(self.stop.received is not None), device=self.accelerator.device)
        if not float(self.accelerator.reduce(asked, "sum")):
            return None
        self.stop.received = self.stop.received or signal.SIGTERM
        return self.stop.received

    def _log(self, done: int) -> dict[str, float]:
        names, sums = self.means.tensors()
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, "sum")
        values = self.means.means(names, sums)
        values |= self.trainers[0].learning_rates
        if self.guard.skipped:
            values["skipped_steps"] = self.guard.skipped
        if self.main:
            self.directory.write_metrics(done, values)
            self.trackers.log(values, done)
        return values

    def _validates(self, done: int) -> bool:
        """Whether validation is due after a step."""
        every = self.loop.validate_every
        due = done == self.loop.steps or bool(every and done % every == 0)
        return self.stage.can_measure and (due if done else self.loop.validate_at_start)

    def _validate(self, done: int, *, saved: bool) -> None:
        """Measure in all processes; keep the checkpoint if the watched metric is the best so far.

        Args:
            done: steps done.
            saved: whether there is a checkpoint of this step.
        """
        self._evaluate(done)
        if self.main and self.metrics and done < self.loop.steps:  # the last ones are told with the result
            logger.info("%s, step %d, held-out images: %s", self.stage.name, done, figures_line(self.metrics))
        watched = self._measured(done) if self.main else None
        found: list[Any] = [watched, watched is not None and self.writer.is_best(watched)]
        if self.accelerator.num_processes > 1 and self.loop.best_metric is not None:
            broadcast_object_list(found)  # all save the best, or none
        if found[1]:
            if not saved:
                self.state.save(self.writer, done)
            if self.main:
                self.writer.keep_best(done, found[0])

    def _evaluate(self, done: int) -> None:
        """Validate with the averaged weights, which the result will have.

        Raises:
            DavaeError: the device runs out of memory.
        """
        if not self.stage.can_measure:
            logger.info("%s: no image is held out (data.hold_out), so nothing is measured", self.stage.name)
            return
        model = self.stage.modules[0].module
        model.eval()
        with self._averaged(), unsharded(model), torch.no_grad():
            try:
                self.metrics = self.stage.validate(self.directory.samples, done)
            except torch.OutOfMemoryError as error:
                raise DavaeError(out_of_memory_message(self.stage, validating=True)) from error
        model.train()

    def _averaged(self) -> AbstractContextManager[None]:
        """Context with the weights of the result in place: averages, or those of training if there are none."""
        return self.ema.applied() if self.ema is not None else self.trainers[0].evaluated()

    def _measured(self, done: int) -> float | None:
        self.directory.write_metrics(done, self.metrics)
        self.trackers.log(self.metrics, done)
        self.trackers.pictures(self.directory.samples, done)
        if self.loop.best_metric is None:
            return None
        best = current_name(self.loop.best_metric)
        if best not in self.metrics:
            raise DavaeError(
                f"loop.best_metric is '{best}', which {self.stage.name} does not measure; it measures "
                f"{', '.join(self.metrics)}. Set it to one of these, or to null, and run the same command again: "
                "it goes on from the last checkpoint"
            )
        return self.metrics[best]

    def _resume(self) -> int:
        """Restore the newest whole checkpoint; returns its step, or 0 if there is none."""
        step = self.state.restore(self.directory.checkpoints)  # or refuses, and the run's files stay as they are
        if step > self.loop.steps:
            key, told = f"{self.stage.section}.loop.steps".lstrip("."), f"{self.out} has made {step} steps already"
            raise DavaeError(f"{told}: set {key}={step} or higher, not {self.loop.steps}, or choose another --out")
        if self.main:
            self.directory.begin()
        if step:
            logger.info("%s continues from step %d", self.stage.name, step)
        if self.main:  # also at step 0: a run may have been killed before its first checkpoint
            self.directory.forget_after(step)
        self.trackers.start(step)
        self.first = step
        if self._validates(step) and not self._was_measured(step):  # stopped between saving and measuring, or new
            self._validate(step, saved=bool(step))
        return step

    def _was_measured(self, step: int) -> bool:
        """Whether ``metrics.jsonl`` has a step's validation metrics (a line without learning rate)."""
        lines = read_metrics(self.directory.metrics_file) if self.main else []
        return everyone(any(line["step"] == step and "learning_rate" not in line for line in lines))[0]

    def _result(self) -> TrainResult:
        self.guard.refuse_if_nothing_was_learnt(self.first, self.loop.steps)
        for entries in everyone(self.ledger.entries):  # every process has skipped files of its own
            self.ledger.add(entries)
        result = self.out
        if not self.metrics:  # resumed at its end: measure again rather than report nothing
            self._evaluate(self.loop.steps)
        with self._averaged():
            unshard_for_good(self.stage.modules[0].module)
            self.stage.measure_latents()
            if self.main:
                result = self.stage.export(self.out)
        facts: list[Any] = [result, self.metrics]
        if self.accelerator.num_processes > 1:
            broadcast_object_list(facts)  # also makes the others wait until the result is written
        result, self.metrics = facts
        if self.ledger.count and self.main:
            logger.warning(self.ledger.summary())
        return TrainResult(self.out, result, self.loop.steps, self.metrics, self.ledger)


def _described(dataset: ItemDataset) -> str:
    """The number of images and a checksum of their names."""
    checksum = 0
    for index in range(len(dataset)):
        checksum = zlib.crc32(dataset.id(index).encode(), checksum)
    return f"{len(dataset)} of names {checksum:08x}"


def to_device(value: Any, device: torch.device) -> Any:
    """The batch with its tensors, also those in nested dictionaries, on the device."""
    if isinstance(value, dict):
        return {k: to_device(v, device) for k, v in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
