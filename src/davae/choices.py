"""Named choices shared by code and recipes, each list defined only here.

Imports nothing heavy, so that recipes are checked without torch.
"""

from typing import Any, Literal, get_args

from davae.errors import DavaeError

Scale = Literal[2, 4, 8]
LatentSpace = Literal["scaled", "raw"]
DownMethod = Literal["unshuffle", "stride"]
BlockStart = Literal["fitted", "warm", "random"]
AbsentDetails = Literal["zero", "enlarged"]
ChannelOrder = Literal["base_first", "detail_first"]
AlignmentForm = Literal["mean", "relational", "projection"]
AlignmentTarget = Literal["base", "prefix"]
Reduction = Literal["mean", "sum"]
LevelOrder = Literal["sequential", "together"]
ReconstructionTarget = Literal["image", "base"]

Scheme = Literal["logit_normal", "uniform"]
LossForm = Literal["velocity", "x0"]
ScheduleShape = Literal["cosine", "linear", "constant"]
TuneMode = Literal["full", "lora", "new_channels"]
NewChannelsStart = Literal["zero", "random"]

Crop = Literal["center", "random"]
StorageDtype = Literal["float32", "float16", "bfloat16"]
FrozenDtype = Literal["float32", "bfloat16"]
Quantization = Literal["none", "8bit", "4bit"]
SavedDtype = Literal["float32", "float16"]

Offload = Literal["model", "sequential"]
Precision = Literal["no", "bf16", "fp16"]
OptimizerKind = Literal["adamw", "adamw8bit", "paged_adamw8bit", "adafactor", "muon", "prodigy", "schedule_free"]
LearningRateSchedule = Literal[
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "linear",
    "polynomial",
    "piecewise_constant",
]
BestMode = Literal["min", "max"]
Tracker = Literal["tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"]

LAST_SEED = 2**31 - 1
"""Largest accepted seed: valid for every generator, with room for the seeds of images that count up from it."""


def check_choice(value: object, choices: Any, what: str) -> None:
    """Raise an error if ``value`` is not one of ``choices``.

    Args:
        value: the value to check.
        choices: a ``Literal`` type, such as those above.
        what: what the value is, for the message.

    Raises:
        DavaeError: names the value and the valid ones.
    """
    *others, last = get_args(choices)
    if value not in (*others, last):
        raise DavaeError(f"unknown {what} '{value}': use {', '.join(map(str, others))} or {last}")
