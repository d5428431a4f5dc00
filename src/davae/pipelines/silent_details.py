"""A guard for pipelines that divide by the norm of a channel's prediction, which is 0 while details are silent.

Lumina 2 rescales its guided prediction, row by row, by ``|conditional| / |guided|``. Detail channels that were never
tuned predict exactly 0: 0 / 0, and after one more step every channel is lost. Where nothing learns, such zeros are
moved off zero by far less than could show; the ratio is then 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from davae.latents import LatentLayout

_TINY = {torch.float16: 2.0**-11}  # the square of each is still a number of its precision
_TINY_ELSEWHERE = 2.0**-60


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
        if (
            torch.is_grad_enabled() or not module.guards_silent_details
        ):  # in training the prediction is itself
            return output
        details = output[0][:, layout.detail]
        details.masked_fill_(details == 0, _TINY.get(details.dtype, _TINY_ELSEWHERE))
        return output

    pipe.transformer.register_forward_hook(off_zero)
    pipe.transformer.guards_silent_details = True


@contextmanager
def unguarded(transformer: Any) -> Iterator[None]:
    """Within the context a guarded transformer predicts what its weights say, zeros included."""
    guarded = hasattr(transformer, "guards_silent_details")
    if guarded:
        transformer.guards_silent_details = False
    try:
        yield
    finally:
        if guarded:
            transformer.guards_silent_details = True
