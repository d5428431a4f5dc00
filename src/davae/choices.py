"""The named choices that the code and the recipes share: each list stands here, and nowhere else.

Nothing heavy is imported, so that a recipe is checked without torch.
"""

from typing import Any, Literal, get_args

from davae.errors import DavaeError

Scale = Literal[2, 4, 8]
LatentSpace = Literal["scaled", "raw"]
ChannelOrder = Literal["base_first", "detail_first"]
AlignmentForm = Literal["mean", "relational", "projection"]
AlignmentTarget = Literal["base", "prefix"]
Reduction = Literal["mean", "sum"]
LevelOrder = Literal["sequential", "together"]

Scheme = Literal["logit_normal", "uniform"]
LossForm = Literal["velocity", "x0"]
ScheduleShape = Literal["cosine", "linear", "constant"]
TuneMode = Literal["full", "lora", "new_channels"]
NewChannelsStart = Literal["zero", "random"]

Crop = Literal["center", "random"]
StorageDtype = Literal["float32", "float16", "bfloat16"]
FrozenDtype = Literal["float32", "bfloat16"]
SavedDtype = Literal["float32", "float16"]

Precision = Literal["no", "bf16", "fp16"]
OptimizerKind = Literal["adamw", "adamw8bit"]
LearningRateSchedule = Literal["constant", "cosine"]
BestMode = Literal["min", "max"]
Tracker = Literal["tensorboard", "wandb", "comet_ml", "aim", "mlflow", "clearml", "dvclive", "swanlab", "trackio"]

LAST_SEED = 2**31 - 1
"""As far as every generator goes, with room for the images that count up from it."""


def check_choice(value: object, choices: Any, what: str) -> None:
    """Refuse a value that is none of ``choices``, one of the types above.

    Args:
        value: what was asked for.
        choices: a ``Literal``.
        what: its name in the message.

    Raises:
        DavaeError: names the value and the known ones.
    """
    *others, last = get_args(choices)
    if value not in (*others, last):
        raise DavaeError(f"unknown {what} '{value}': use {', '.join(map(str, others))} or {last}")
