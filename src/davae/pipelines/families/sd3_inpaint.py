"""SD3's inpainting pipeline with any number of latent channels.

diffusers' class compares the transformer's input channels with 16 (it paints what is masked) and 33 (a transformer
that is told the mask), and refuses all others. An upgraded transformer has more, and is meant to do the former.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_utils import ModelMixin

_PLAIN = 16  # what the class takes for a transformer that is not told the mask


class _SeenAsPlain:
    """A transformer whose configuration says 16 input channels; all else is the transformer's."""

    def __init__(self, transformer: ModelMixin) -> None:
        self.plain_transformer = transformer
        self.config = FrozenDict({**transformer.config, "in_channels": _PLAIN})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain_transformer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plain_transformer, name)


class StableDiffusion3InpaintPipeline(diffusers.StableDiffusion3InpaintPipeline):
    """As in diffusers, whose name it keeps so that a saved pipeline says so; latents may have any channels."""

    @functools.wraps(diffusers.StableDiffusion3InpaintPipeline.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers."""
        self.__dict__["transformer"] = _SeenAsPlain(self.transformer)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            self._unveil()

    def maybe_free_model_hooks(self) -> None:
        """Called at the end, and then the transformer must be itself to be moved."""
        self._unveil()
        super().maybe_free_model_hooks()

    def _unveil(self) -> None:
        if isinstance(self.transformer, _SeenAsPlain):
            self.__dict__["transformer"] = self.transformer.plain_transformer
