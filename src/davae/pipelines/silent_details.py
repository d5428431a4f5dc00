"""A guard for pipelines that divide by the norm of a channel's prediction, which is 0 while details are silent.

Lumina 2 rescales its guided prediction, row by row, by ``|conditional| / |guided|``. Detail channels that were never
tuned predict exactly 0: 0 / 0, and after one more step every channel is lost. Where nothing learns, such a prediction
is moved off zero by far less than it could show; the ratio is then 1.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae.latents import LatentLayout

_TINY = 1e-15  # its square is still a float32


def guard_silent_details(pipe: DiffusionPipeline, layout: LatentLayout) -> None:
    """Add the guard to the transformer of a pipeline that needs it, once. Its weights stay as they are.

    Args:
        pipe: an upgraded pipeline.
        layout: of its latent.
    """
    is_lumina = any(cls.__name__ == "Lumina2Pipeline" for cls in type(pipe).__mro__)
    if not is_lumina or hasattr(pipe.transformer, "guards_silent_details"):
        return

    def off_zero(module: nn.Module, arguments: Any, output: Any) -> Any:
        if torch.is_grad_enabled():  # in training the prediction is itself
            return output
        sample = output[0]
        sample[:, layout.detail] += _TINY
        return output

    pipe.transformer.register_forward_hook(off_zero)
    pipe.transformer.guards_silent_details = True
