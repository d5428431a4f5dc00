"""The training loop, one for every stage.

A :class:`Stage` says what is trained and what a step costs; :func:`train` does the rest: precision,
accumulation, clipping, averages, learning rates, metrics, validation, checkpoints and going on after a stop.

All randomness inside a step (noise, dropout, time) is drawn from generators seeded by
``(seed, step, micro-step, process)``. A run that stops and continues therefore sees what an uninterrupted one
would have seen, and ends with the same weights.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from davae.data import BatchStream, SkipLedger
from davae.errors import DavaeError
from davae.training.checkpoint import (
    checkpoints,
    load_checkpoint,
    module_tensors,
    optimizer_tensors,
    restore_module,
    restore_optimizer,
    save_checkpoint,
)
from davae.training.ema import Ema
from davae.training.progress import Progress
from davae.training.run_directory import RunDirectory
from davae.training.settings import LoopSettings, OptimizerSettings

logger = logging.getLogger(__name__)


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
    """Train a stage in the run directory ``out``, from its newest checkpoint where there is one.

    Args:
        stage: what to train.
        out: the run directory.
        recipe: the resolved recipe as plain values, kept beside the result.
        stop_after: leave after this many steps with a checkpoint and without a result, as an interrupted run
            does.

    Returns:
        The result, or none when ``stop_after`` ended the run early.

    Raises:
        DavaeError: the directory holds another run, a loss is not finite, or most images are unreadable.
    """
    loop = stage.loop
    AcceleratorState._reset_state()  # one process may train several stages, each with its own precision
    accelerator = Accelerator(
        mixed_precision=loop.precision, log_with=loop.report_to or None, project_dir=str(out), cpu=_use_cpu()
    )
    main = accelerator.is_main_process
    run = RunDirectory(out, recipe)
    if loop.report_to and main:
        accelerator.init_trackers("tracking")

    stage.to(accelerator.device)
    for player in stage.players:
        player.module.to(accelerator.device).train()  # loaded models come in eval mode
        if loop.channels_last:
            player.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    modules, optimizers = [], []
    for player in stage.players:
        module, optimizer = accelerator.prepare(player.module, _optimizer(player))
        modules.append(module)
        optimizers.append(optimizer)
    ema = Ema(stage.players[0].trained(), loop.ema_decay) if loop.ema_decay is not None else None
    stream = BatchStream(
        stage.dataset,
        loop.batch_size,
        seed=loop.seed,
        workers=stage.workers,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    ledger = SkipLedger.for_dataset(stage.dataset)

    start = _resume(run, stage.players, optimizers, ema, stream, ledger)
    if start:
        logger.info("%s continues from step %d", stage.name, start)
        run.forget_metrics_after(start)
    window = _Window()
    batches = iter(stream)
    metrics: dict[str, float] = {}
    with Progress(stage.name, loop.steps, start, enabled=main) as progress:
        for step in range(start, loop.steps):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for micro in range(loop.gradient_accumulation):
                batch = next(batches)
                ledger.add(batch.pop("skipped", []))
                last = micro == loop.gradient_accumulation - 1
                batch = _to_device(batch, accelerator.device)
                for module, player in zip(modules, stage.players):
                    _seed_step(loop.seed, step, micro, accelerator.process_index)
                    with nullcontext() if last else accelerator.no_sync(module), accelerator.autocast():
                        losses = module(batch, step)
                    accelerator.backward(losses["total"] / loop.gradient_accumulation)
                    window.add(losses, player.name if player is not stage.players[0] else "")
            if accelerator.device.type == "cpu":
                window.check(stage.name, step + 1)
            for player, optimizer in zip(stage.players, optimizers):
                rate = learning_rate(player.optimizer, step, loop.steps)
                for group in optimizer.param_groups:
                    group["lr"] = rate * group["rate_factor"]
                if loop.max_grad_norm is not None:
                    norm = accelerator.clip_grad_norm_(player.trained(), loop.max_grad_norm)
                    if player is stage.players[0]:
                        window.add({"gradient_norm": norm})
                optimizer.step()
            if ema is not None:
                ema.update()

            done = step + 1
            stopping = done == stop_after
            if done % loop.log_every == 0 or done == loop.steps:
                window.check(stage.name, done)
                values = window.flush() | {"learning_rate": optimizers[0].param_groups[0]["lr"]}
                if main:
                    run.write_metrics(done, values)
                    accelerator.log(values, step=done)
                progress.losses(values)
            if done == loop.steps or (loop.validate_every and done % loop.validate_every == 0):
                metrics = _validate(stage, ema, run, done, main)
                if main:
                    accelerator.log(metrics, step=done)
            if done % loop.checkpoint_every == 0 or done == loop.steps or stopping:
                window.check(stage.name, done)
                if main:
                    _save(run, done, loop, stage.players, optimizers, ema, stream, ledger)
                accelerator.wait_for_everyone()
            progress.advance()
            if stopping and done < loop.steps:
                accelerator.end_training()
                return None
    ledger.check()
    with ema.applied() if ema is not None else nullcontext():
        if not metrics:  # the run had ended before: measure again rather than report nothing
            metrics = stage.validate(run.samples, loop.steps)
        result = stage.export(out)
    accelerator.end_training()
    if ledger.count:
        logger.warning(ledger.summary())
    return TrainResult(out, result, loop.steps, metrics, ledger)


def learning_rate(settings: OptimizerSettings, step: int, steps: int) -> float:
    """Learning rate of a step: linear warm-up, then constant or a cosine down to ``lr_end``."""
    peak, warmup = settings.learning_rate, settings.lr_warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.lr_scheduler == "constant":
        return peak
    progress = (step - warmup) / max(1, steps - warmup)
    return settings.lr_end + (peak - settings.lr_end) * (1 + math.cos(math.pi * progress)) / 2


def _optimizer(player: Player) -> torch.optim.AdamW:
    settings = player.optimizer
    named = [(n, p) for n, p in player.module.named_parameters() if p.requires_grad]
    if not named:
        raise DavaeError(f"{player.name}: no parameter is trained; check what the recipe tunes")
    rates: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        rates.setdefault(player.learning_rates.get(name, settings.learning_rate), []).append(parameter)
    groups = [{"params": p, "rate_factor": rate / settings.learning_rate} for rate, p in rates.items()]
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True,
    )


class _Window:
    """Sums of losses since the last logged line, kept on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, losses: dict[str, Tensor], prefix: str = "") -> None:
        for name, value in losses.items():
            key = f"{prefix}_{name}" if prefix else name
            self.sums[key] = self.sums.get(key, 0.0) + value.detach().float()
            self.counts[key] = self.counts.get(key, 0) + 1

    def check(self, stage: str, step: int) -> None:
        for name, value in self.sums.items():
            if not torch.isfinite(value):
                raise DavaeError(
                    f"{stage}: '{name}' is not finite at step {step}. The last checkpoint is whole; lower the "
                    f"learning rate, set loop.max_grad_norm, or use loop.precision=no to find the cause"
                )

    def flush(self) -> dict[str, float]:
        means = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return means


def _validate(stage: Stage, ema: Ema | None, run: RunDirectory, step: int, main: bool) -> dict[str, float]:
    model = stage.players[0].module
    model.eval()
    with ema.applied() if ema is not None else nullcontext(), torch.no_grad():
        values = stage.validate(run.samples, step)
    model.train()
    if main:
        run.write_metrics(step, values)
    return values


def _save(
    run: RunDirectory,
    step: int,
    loop: LoopSettings,
    players: list[Player],
    optimizers: list[Any],
    ema: Ema | None,
    stream: BatchStream,
    ledger: SkipLedger,
) -> None:
    tensors = {}
    for player, optimizer in zip(players, optimizers):
        tensors[player.name] = module_tensors(player.module)
        tensors[f"{player.name}_optimizer"] = optimizer_tensors(optimizer)
    values: dict[str, Any] = {"stream": stream.state_dict(), "skipped": ledger.state_dict()}
    if ema is not None:
        tensors["averages"] = {str(i): a for i, a in enumerate(ema.averages)}
        values["ema_updates"] = ema.updates
    save_checkpoint(run.checkpoints, step, tensors, values, keep=loop.checkpoints_total_limit)


def _resume(
    run: RunDirectory,
    players: list[Player],
    optimizers: list[Any],
    ema: Ema | None,
    stream: BatchStream,
    ledger: SkipLedger,
) -> int:
    found = checkpoints(run.checkpoints)
    if not found:
        return 0
    tensors, values = load_checkpoint(found[-1])
    for player, optimizer in zip(players, optimizers):
        restore_module(player.module, tensors[player.name], found[-1])
        restore_optimizer(optimizer, tensors[f"{player.name}_optimizer"])
    if ema is not None:
        ema.updates = values["ema_updates"]
        for i, average in enumerate(ema.averages):
            average.copy_(tensors["averages"][str(i)])
    stream.load_state_dict(values["stream"])
    ledger.load_state_dict(values["skipped"])
    return int(values["step"])


def _seed_step(seed: int, step: int, micro: int, process: int) -> None:
    """Seed torch's generators so that a step's draws depend on nothing that came before it."""
    mixed = torch.Generator().manual_seed(seed * 1_000_003 + step)
    base = int(torch.randint(2**62, (), generator=mixed))
    torch.manual_seed(base + 1_009 * micro + process)


def _to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _use_cpu() -> bool:
    return not torch.cuda.is_available() and not torch.backends.mps.is_available()
