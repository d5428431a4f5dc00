"""Seconds and memory of a training step, its fast forms beside the plain one; and where its time goes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from davae.benchmark.inference import device_name
from davae.benchmark.timing import peak_tensor_bytes, side_by_side, synchronise
from davae.benchmark.training_stages import FORMS, DiffusionBenchStage, Form, StepSettings, autoencoder_stage
from davae.choices import Precision, Scale, check_choice
from davae.errors import DavaeError
from davae.planner.architectures import Architecture, find_architecture
from davae.runtime.processes import use_cpu
from davae.training.loop.loop import steps_of
from davae.training.stage import Stage

StageName = Literal["autoencoder", "diffusion"]
STAGES: tuple[StageName, ...] = ("autoencoder", "diffusion")
_MAKERS: dict[str, Callable[[Architecture, StepSettings, Form], Stage]] = {
    "autoencoder": autoencoder_stage,
    "diffusion": DiffusionBenchStage,
}


@dataclass(frozen=True)
class TrainingRow:
    """One form of a stage's step.

    Attributes:
        stage: ``autoencoder`` or ``diffusion``.
        form: ``plain``, ``fast``, or ``fast, cached``.
        step_seconds: median of a whole step: data, forward, backward, clipping, optimizer, averages.
        images_per_second: the batch over it.
        memory_bytes: largest sum of tensors made during a step and alive at one time: activations and gradients;
            weights and the optimizer's state, which are there before, are not in it.
        speedup: over the plain form, the median of the ratios round by round.
        memory_over_plain: of the bytes.
    """

    stage: str
    form: str
    step_seconds: float
    images_per_second: float
    memory_bytes: int
    speedup: float
    memory_over_plain: float


@dataclass(frozen=True)
class TrainingBenchmark:
    """A benchmark's rows, under which conditions they were measured, and profiles where asked for."""

    base: str
    resolution: int
    scale: int
    batch: int
    gan: bool
    tune: str
    device: str
    precision: str
    compiled: bool
    repeats: int
    torch: str
    rows: list[TrainingRow]
    profiles: dict[str, StepProfile] = field(default_factory=dict)
    """Of the cached form, by stage."""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_training(
    base: str,
    *,
    resolution: int,
    scale: int = 2,
    detail_channels: int | None = None,
    batch: int = 4,
    stages: Sequence[StageName] = STAGES,
    gan: bool = False,
    tune: Literal["full", "lora"] = "full",
    precision: Precision = "no",
    compile: bool = False,
    repeats: int = 5,
    profile: bool = False,
) -> TrainingBenchmark:
    """Time a step of both stages in three forms, in turns, with random weights, on the device that training takes.

    The plain form has contiguous memory, compiles nothing, encodes images and prompts in every step and computes
    adaptive weights by whole backward passes of their own. All forms take the same steps up to rounding. The three
    forms of a stage are in memory together.

    Args:
        base: a preset, a name on the hub, a pipeline folder, ``tiny``, ``debug`` and kin.
        resolution: side of the full image in pixels.
        scale: of the upgrade.
        detail_channels: ``D``; none takes `default_detail_channels`.
        batch: images a step.
        stages: which.
        gan: the autoencoder stage with its adversarial term, whose weight is adaptive as well.
        tune: which weights of the transformer learn.
        precision: as in ``loop.precision``.
        compile: as in ``loop.compile``, of the fast forms.
        repeats: rounds; medians are taken.
        profile: also tell where the time of the cached form goes.

    Raises:
        DavaeError: nothing of that name, sizes that do not divide, a pipeline that cannot be trained, or too few
            rounds.
    """
    if repeats < 1:
        raise DavaeError(f"repeats must be at least 1, not {repeats}")
    unknown = sorted(set(stages) - set(STAGES))
    if unknown or not stages:
        raise DavaeError(f"stages must be of {' and '.join(STAGES)}, not {', '.join(unknown) or 'none'}")
    architecture = find_architecture(base)
    check_choice(scale, Scale, "scale")
    settings = StepSettings(
        resolution=resolution,
        scale=scale,  # type: ignore[arg-type]
        detail_channels=detail_channels,
        batch=batch,
        gan=gan,
        tune=tune,
        precision=precision,
        compile=compile,
    )
    device = "cpu" if use_cpu() else "cuda" if torch.cuda.is_available() else "mps"
    rows: list[TrainingRow] = []
    profiles: dict[str, StepProfile] = {}
    for stage in stages:
        with ExitStack() as opened:
            steps = {
                form: steps_of(
                    _MAKERS[stage](architecture, settings, form),
                    Path(opened.enter_context(tempfile.TemporaryDirectory())),
                )
                for form in FORMS
            }
            rows += _rows(stage, steps, batch, repeats, device)
            if profile:
                profiles[stage] = profile_step(steps["fast, cached"])
    return TrainingBenchmark(
        base=base,
        resolution=resolution,
        scale=scale,
        batch=batch,
        gan=gan,
        tune=tune,
        device=device_name(device),
        precision=precision,
        compiled=compile,
        repeats=repeats,
        torch=torch.__version__,
        rows=rows,
        profiles=profiles,
    )


def _rows(
    stage: str, steps: dict[Form, Callable[[], None]], batch: int, repeats: int, device: str
) -> list[TrainingRow]:
    timed = side_by_side({str(form): step for form, step in steps.items()}, repeats)
    memory = {form: peak_tensor_bytes(step, device) for form, step in steps.items()}
    return [
        TrainingRow(
            stage=stage,
            form=form,
            step_seconds=timed.medians[form],
            images_per_second=batch / timed.medians[form],
            memory_bytes=memory[form],
            speedup=timed.speedup(form, "plain"),
            memory_over_plain=memory[form] / memory["plain"],
        )
        for form in steps
    ]


_BACKWARD = "autograd::engine::evaluate_function"
_OPTIMIZER = "Optimizer.step#"
_DATA = "enumerate(DataLoader)#"


@dataclass(frozen=True)
class OperatorTime:
    """One operator. Attributes: name; its own seconds; their share of all operators' own; how often it ran."""

    name: str
    seconds: float
    share: float
    calls: int


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes.

    Attributes:
        parts: shares of ``forward``, ``backward``, ``optimizer`` and ``data``, 1 together. The optimizer's is AdamW's
            alone; clipping, the average of weights and the check of gradients count as forward.
        operators: the ten most expensive ones, the first one first.
    """

    parts: dict[str, float]
    operators: list[OperatorTime]


def profile_step(step: Callable[[], None]) -> StepProfile:
    """Profile one call, after one that is not counted.

    On a GPU the times are the device's, but for the loading of data.

    Args:
        step: a training step, as `davae.training.loop.loop.steps_of` gives it.
    """
    step()
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    synchronise()
    with profile(activities=activities) as recorded:
        step()
        synchronise()
    averages = list(recorded.key_averages())

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6

    def whole(event: Any) -> float:
        return float(event.device_time_total if cuda else event.cpu_time_total) / 1e6

    def under(name: str, measure: Callable[[Any], float]) -> float:
        return sum(measure(event) for event in averages if event.key.startswith(name))

    data = sum(float(e.cpu_time_total) for e in averages if e.key.startswith(_DATA)) / 1e6
    total = sum(map(own, averages))
    spent = {"backward": under(_BACKWARD, whole), "optimizer": under(_OPTIMIZER, whole), "data": data}
    rest = max(0.0, total - spent["backward"] - spent["optimizer"] - (0.0 if cuda else data))
    parts = {"forward": rest, **spent}
    return StepProfile(_shares(parts), _most_expensive(averages, own, total))


def _shares(parts: dict[str, float]) -> dict[str, float]:
    together = sum(parts.values()) or 1.0
    return {name: seconds / together for name, seconds in parts.items()}


def _most_expensive(averages: Iterable[Any], own: Callable[[Any], float], total: float) -> list[OperatorTime]:
    named = [event for event in averages if event.key.startswith(("aten::", "fused", "triton"))]
    named.sort(key=own, reverse=True)
    return [OperatorTime(e.key, own(e), own(e) / (total or 1.0), int(e.count)) for e in named[:10]]
