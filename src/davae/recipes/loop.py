"""The ``loop`` and ``optimizer`` sections of a recipe, the same for every stage."""

import os
from typing import Annotated, Any, Final, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from davae.choices import LAST_SEED, BestMode, LearningRateSchedule, OptimizerKind, Precision, Tracker

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Weight = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


def in_steps(value: int | float, steps: int) -> int:
    """A number of steps, or a share of ``steps`` below 1, as a number of steps."""
    return round(value * steps) if value < 1 else int(value)


def _whole_or_share(value: int | float) -> int | float:
    if value < 1:
        return value
    if value != int(value):
        raise ValueError("give whole steps, or a share of the run's steps below 1")
    return int(value)


StepsOrShare = Annotated[int | float, Field(ge=0), AfterValidator(_whole_or_share)]
Seed = Annotated[int, Field(ge=0, le=LAST_SEED)]


class _MayChange:
    """Type of :data:`MAY_CHANGE`."""


MAY_CHANGE: Final = _MayChange()
"""Marks a setting that may change when a run resumes (``workers: Annotated[int, MAY_CHANGE]``): how long and how fast
it trains, how steps are computed, measured and saved, but not what is learned."""

MAY_MOVE: Final = _MayChange()
"""Marks a setting that is a path. A run may resume with another path if it leads to the same weights, or to the same
images and perhaps more: contents are compared, not names."""


AT_HOME: Final = AfterValidator(lambda path: path and os.path.expanduser(path))  # pathlib's fails for unknown users
"""Marks a path that may begin with ``~``, the home folder: shells leave it as it is in ``key=~/folder``."""


class Section(BaseModel):
    """A section of a recipe: unknown keys are errors, and values are immutable.

    The docstring below a field is its description, from which the tables in docs/training.md are generated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _as_list(value: object) -> object:
    """A single name becomes a list of one; ``None`` an empty list."""
    return [] if value is None else [value] if isinstance(value, str) else value


class LoopSettings(Section):
    """How long and how the loop runs."""

    @model_validator(mode="before")
    @classmethod
    def _without_plain(cls, values: Any) -> Any:
        """Accept ``plain: false`` of earlier versions, which is what every run does now."""
        if not isinstance(values, dict) or "plain" not in values:
            return values
        if values["plain"] is not False:
            raise ValueError(
                "'plain' is gone: steps have one form. Remove it; `davae bench training` times the plain form of a step"
            )
        return {key: value for key, value in values.items() if key != "plain"}

    steps: Annotated[Positive, MAY_CHANGE]
    """Optimizer steps of the whole run."""
    batch_size: Annotated[Positive, MAY_CHANGE]
    """Images per process and micro-step."""
    gradient_accumulation: Annotated[Positive, MAY_CHANGE] = 1
    """Micro-steps per optimizer step."""
    max_grad_norm: Annotated[PositiveFloat | None, MAY_CHANGE] = None
    """Gradients are scaled down to this norm; none leaves them as they are."""
    skip_grad_norm: Annotated[PositiveFloat | None, MAY_CHANGE] = None
    """A step whose gradient norm exceeds this is skipped, like one that is not finite."""
    max_skipped_steps: Annotated[Positive, MAY_CHANGE] = 10
    """Skipped steps in a row after which the run stops and saves what is needed to find the cause."""
    ema_decay: Probability | None = None
    """Decay of the exponential moving average of the weights per step; none keeps no average."""
    offload_ema: Annotated[bool, MAY_CHANGE] = False
    """Keep the average in main memory: 4 bytes a trained weight less on a GPU, and a copy of the weights each step."""
    precision: Annotated[Precision, MAY_CHANGE] = "no"
    """Autocast of the forward pass; ``no`` computes in float32."""
    channels_last: Annotated[bool, MAY_CHANGE] = True
    """Convolutions in channels-last memory order: the same numbers, faster on most devices."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """``torch.compile`` of what is repeated: the blocks of a transformer, encoders and decoders
    ([speed.md](speed.md))."""
    gradient_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more time."""
    seed: Seed = 0
    """Determines all random numbers of the run."""
    log_every: Annotated[Positive, MAY_CHANGE] = 10
    """Steps between lines of ``metrics.jsonl``."""
    validate_every: Annotated[NotNegative, MAY_CHANGE] = 0
    """Steps between validations; 0 validates at the end only. Without held-out images there are none."""
    validate_at_start: Annotated[bool, MAY_CHANGE] = False
    """Validate before the first step too: what the start is worth."""
    validation_images: Annotated[Positive, MAY_CHANGE] = 16
    """Held-out images that a validation reads."""
    checkpoint_every: Annotated[Positive, MAY_CHANGE] = 100
    """Steps between checkpoints."""
    checkpoints_total_limit: Annotated[Positive, MAY_CHANGE] = 2
    """Newest checkpoints that are kept."""
    best_metric: Annotated[str | None, MAY_CHANGE] = None
    """A validation metric; the checkpoint where it was best is kept besides the newest ones."""
    best_mode: Annotated[BestMode, MAY_CHANGE] = "min"
    """Whether the least or the greatest ``best_metric`` is best."""
    report_to: Annotated[list[Tracker], BeforeValidator(_as_list), MAY_CHANGE] = Field(default=["tensorboard"])
    """Trackers known to accelerate; ``metrics.jsonl`` is written in any case."""
    tracker_project_name: Annotated[str, MAY_CHANGE] = "davae"
    """Project of the trackers that have projects."""
    tracker_run_name: Annotated[str | None, MAY_CHANGE] = None
    """Name of the run there; none takes its folder's."""


def _rules(text: str) -> str:
    """Check the rules of ``piecewise_constant``."""
    *rules, last = text.split(",")
    try:
        float(last)
        for rule in rules:
            factor, step = rule.split(":")
            float(factor), int(step)
    except ValueError:
        raise ValueError("give factor:step, ..., and the last factor, such as 1:1000,0.1:2000,0.01") from None
    return text


class OptimizerSettings(Section):
    """The optimizer and its learning-rate schedule."""

    kind: OptimizerKind = "adamw"
    """``adamw8bit`` keeps the moments in 8 bits, a quarter of the memory, and ``paged_adamw8bit`` lets them move to
    main memory when a GPU's is full; ``adafactor`` keeps rows and columns of the second moment; ``muon`` is for
    matrices within blocks, with AdamW for the rest; ``prodigy`` finds the rate (``learning_rate: 1``);
    ``schedule_free`` needs no decay and averages by itself (``ema_decay: null``). All but ``adamw`` need whole weights,
    no FSDP."""
    learning_rate: Annotated[PositiveFloat, MAY_CHANGE]
    """After the warm-up."""
    betas: Annotated[tuple[Probability, Probability], MAY_CHANGE] = (0.9, 0.999)
    """Decay of the first and second moment."""
    weight_decay: Annotated[Weight, MAY_CHANGE] = 0.0
    """Decoupled: weights shrink by this share of the learning rate each step."""
    decay_only_matrices: Annotated[bool, MAY_CHANGE] = True
    """Leave norms and biases, and whatever else has one dimension, without weight decay, as the official code."""
    eps: Annotated[PositiveFloat, MAY_CHANGE] = 1e-8
    """Added to the root of the second moment."""
    lr_scheduler: Annotated[LearningRateSchedule, MAY_CHANGE] = "constant"
    """Shape of the learning rate after the warm-up: those of diffusers."""
    lr_warmup_steps: Annotated[StepsOrShare, MAY_CHANGE] = 0
    """Steps over which the learning rate rises linearly from 0; below 1 a share of ``loop.steps``."""
    lr_end: Annotated[Weight, MAY_CHANGE] = 0.0
    """Learning rate at the last step of the schedules that fall."""
    lr_num_cycles: Annotated[Positive, MAY_CHANGE] = 1
    """Cycles of ``cosine_with_restarts``."""
    lr_power: Annotated[PositiveFloat, MAY_CHANGE] = 1.0
    """Power of ``polynomial``."""
    lr_step_rules: Annotated[str, MAY_CHANGE, AfterValidator(_rules)] = "1"
    """Factors of ``piecewise_constant`` with the steps before which they hold, and the last one, such as
    ``1:1000,0.1:2000,0.01``."""


class TrainedSection(Section):
    """A section with ``loop`` and ``optimizer``: shares of the run's steps become steps."""

    @model_validator(mode="after")
    def _shares_in_steps(self) -> Self:
        loop: LoopSettings = self.__dict__["loop"]
        for part, key in (("optimizer", "lr_warmup_steps"), ("loss", "detail_warmup_steps")):
            section = getattr(self, part, None)
            value = getattr(section, key, 0)
            if section is not None and 0 < value < 1:  # sections cannot be changed from outside
                object.__setattr__(self, part, section.model_copy(update={key: in_steps(value, loop.steps)}))
        return self
