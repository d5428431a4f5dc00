"""What the launcher says about DeepSpeed, kept out of accelerate's hands.

accelerate's own way with DeepSpeed takes over precision, the backward pass and the step at once; a step could then
not be judged before it is made. So accelerate starts the processes as for DDP, and :mod:`davae.training.zero` uses
DeepSpeed's engine for the model.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any

from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available, patch_environment

from davae.errors import DavaeError
from davae.recipes.loop import LoopSettings

LAUNCHER = "the accelerate configuration (--config_file)"


def asked_for() -> bool:
    """Whether the launcher was told to use DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def as_for_ddp() -> AbstractContextManager[Any]:
    """Within the context accelerate does not see that DeepSpeed is asked for.

    Raises:
        DavaeError: it is asked for and not installed.
    """
    if asked_for() and not is_deepspeed_available():
        raise DavaeError(
            f"{LAUNCHER} asks for DeepSpeed, which is not installed: `pip install deepspeed`, or take "
            "configs/accelerate/fsdp2-zero2.yaml, which does the same with torch alone"
        )
    return patch_environment(ACCELERATE_USE_DEEPSPEED="false")


def engine_settings(loop: LoopSettings, processes: int) -> dict[str, Any]:
    """DeepSpeed's configuration for a training: the launcher's, with what the recipe decides filled in.

    Args:
        loop: batch, gradient accumulation, precision.
        processes: how many train.

    Raises:
        DavaeError: the configuration asks for another stage than ZeRO-2, for offloading, for half precision, for an
            optimizer or a schedule; or the recipe for float16 or the plain form of a step.
    """
    found: dict[str, Any] = DeepSpeedPlugin().deepspeed_config
    zero = {key: value for key, value in found["zero_optimization"].items() if value != "auto"}
    if zero.get("stage") != 2:
        raise DavaeError(
            f"{LAUNCHER} asks for ZeRO-{zero.get('stage')}; set zero_stage: 2, or take "
            "configs/accelerate/fsdp2.yaml for what ZeRO-3 does"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (zero.pop(part, None) or {}).get("device", "none") != "none":
            raise DavaeError(f"{LAUNCHER} sets {part}_device, which is not supported: set it to none")
    for key in ("fp16", "bf16", "torch_autocast"):
        if (found.get(key) or {}).get("enabled") is True:
            raise DavaeError(f"{LAUNCHER} turns {key} on: precision is the recipe's, set loop.precision=bf16")
    for key in ("optimizer", "scheduler"):
        if key in found:
            raise DavaeError(f"{LAUNCHER} names the {key}: it is the recipe's, leave it out")
    if loop.precision == "fp16":
        raise DavaeError(
            f"loop.precision=fp16, while {LAUNCHER} asks for DeepSpeed. Take loop.precision=bf16"
        )
    if loop.plain:
        raise DavaeError(
            f"loop.plain=true, while {LAUNCHER} asks for DeepSpeed, which has no plain form of a step"
        )
    ours = {
        "train_micro_batch_size_per_gpu": loop.batch_size,
        "gradient_accumulation_steps": loop.gradient_accumulation,
        "train_batch_size": loop.batch_size * loop.gradient_accumulation * processes,
        "gradient_clipping": 0.0,  # done before, where the norm is known
        "zero_allow_untested_optimizer": True,
        "steps_per_print": float("inf"),
        "zero_optimization": zero,
    }
    theirs = {key: value for key, value in found.items() if value not in ("auto", None)}
    return {**theirs, **ours}
