"""Time and memory of a training step, in fast forms and in the plain one, and a profile of where the time goes."""

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
from davae.benchmark.timing import peak_memory_bytes, peak_tensor_bytes, side_by_side
from davae.benchmark.training_stages import FORMS, DiffusionBenchStage, Form, StepSettings, autoencoder_stage
from davae.choices import Precision, Scale, check_choice
from davae.errors import DavaeError
from davae.planner.architectures import Architecture, find_architecture
from davae.runtime.devices import synchronise
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
    """Measurements of one form of a stage's training step.

    Attributes:
        stage: ``autoencoder`` or ``diffusion``.
        form: ``plain``, ``fast``, or ``fast, cached``.
        step_seconds: median of a whole step: data, forward, backward, clipping, optimizer, averages.
        images_per_second: batch size over ``step_seconds``.
        memory_bytes: peak memory of tensors allocated during a step (activations, gradients), without existing weights
            and optimizer state.
        speedup: over the plain form, the median of the ratios of all rounds.
        memory_over_plain: ``memory_bytes`` over the plain form's.
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
    """A benchmark's rows, the conditions of measurement, and profiles if requested."""

    base: str
    resolution: int
    scale: int
    batch: int
    gan: bool
    official: bool
    lpips: bool
    tune: str
    device: str
    precision: str
    compiled: bool
    repeats: int
    torch: str
    process_memory_bytes: int
    """Peak resident memory of the whole process, with all forms in it."""
    rows: list[TrainingRow]
    profiles: dict[str, StepProfile] = field(default_factory=dict)
    """Profiles of the last form, by stage."""

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
    forms: Sequence[Form] = FORMS,
    gan: bool = False,
    official: bool = False,
    lpips: str | None = None,
    tune: Literal["full", "lora"] = "full",
    precision: Precision = "no",
    compile: bool = False,
    repeats: int = 5,
    profile: bool = False,
) -> TrainingBenchmark:
    """Time a training step of both stages in three forms, alternating, with random weights, on training's device.

    The plain form uses contiguous memory, compiles nothing, encodes images and prompts in every step and computes
    adaptive weights by separate full backward passes, in diffusers' own blocks. All forms make the same steps up to
    rounding. The forms of a stage are in memory together.

    Args:
        base: a preset, a name on the hub, a pipeline folder, ``tiny``, or a debug base such as ``debug``.
        resolution: side of the full image in pixels.
        scale: of the upgrade.
        detail_channels: ``D``; by default `default_detail_channels`.
        batch: images per step.
        stages: which to measure.
        forms: which to measure, ``plain`` among them.
        gan: train the autoencoder with the adversarial term, whose weight is adaptive too.
        official: train the autoencoder with the losses of the official SD3 code: frozen detail encoder, target by the
            frozen base, fixed alignment weight, no GAN. The cached form keeps targets too.
        lpips: VGG-16 file of an LPIPS term in the official losses.
        tune: which weights of the transformer are trained.
        precision: as in ``loop.precision``.
        compile: as in ``loop.compile``, for the fast forms.
        repeats: number of rounds; medians are reported.
        profile: also profile the last form.

    Raises:
        DavaeError: an unknown base or stage, sizes that do not divide, an untrainable pipeline, or ``repeats`` below 1.
    """
    if repeats < 1:
        raise DavaeError(f"repeats must be at least 1, not {repeats}")
    unknown = sorted(set(stages) - set(STAGES))
    if unknown or not stages:
        raise DavaeError(f"stages must be among {', '.join(STAGES)}, not {', '.join(unknown) or 'none'}")
    if "plain" not in forms or set(forms) - set(FORMS):
        raise DavaeError(f"forms must be plain and others among {', '.join(FORMS)}, not {', '.join(forms) or 'none'}")
    if official and gan:
        raise DavaeError("the official SD3 losses have no adversarial term: give --official or --gan")
    if lpips and not official:
        raise DavaeError("--lpips adds a term to the official losses: give --official with it, or leave it out")
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
        official=official,
        lpips=lpips,
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
                for form in forms
            }
            rows += _rows(stage, steps, batch, repeats, device)
            if profile:
                profiles[stage] = profile_step(steps[forms[-1]])
    return TrainingBenchmark(
        base=base,
        resolution=resolution,
        scale=scale,
        batch=batch,
        gan=gan,
        official=official,
        lpips=lpips is not None,
        tune=tune,
        device=device_name(device),
        precision=precision,
        compiled=compile,
        repeats=repeats,
        torch=torch.__version__,
        process_memory_bytes=peak_memory_bytes(),
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
    """One operator: name, self time in seconds, its share of the total self time, and number of calls."""

    name: str
    seconds: float
    share: float
    calls: int


@dataclass(frozen=True)
class StepProfile:
    """Where the time of a step goes.

    Attributes:
        parts: shares of ``forward``, ``backward``, ``optimizer`` and ``data``; they sum to 1. ``optimizer`` is AdamW
            alone; clipping, weight averages and the check of gradients count as forward.
        operators: the ten with the largest self time, in descending order.
    """

    parts: dict[str, float]
    operators: list[OperatorTime]


def profile_step(step: Callable[[], None]) -> StepProfile:
    """Profile one call, after a warm-up call.

    With CUDA, times are the device's, except for data loading.

    Args:
        step: a training step, from `davae.training.loop.loop.steps_of`.
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
