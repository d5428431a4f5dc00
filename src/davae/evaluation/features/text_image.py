"""Embeddings of images and texts in one space, for the CLIP score."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoTokenizer

from davae.errors import DavaeError
from davae.evaluation.features.transformers_model import TransformersFeatures, embedding


class TextImageNetwork(TransformersFeatures):
    """A transformers model with ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP) and its tokenizer.

    Raises:
        DavaeError: it cannot be loaded, or knows no texts.
    """

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        super().__init__(name, device=device)
        if not hasattr(self._model, "get_text_features"):
            raise DavaeError(
                f"a CLIP score needs a model of images and texts; {type(self._model).__name__} has none"
            )
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise DavaeError(
                f"'{name}' has no tokenizer: fetch its tokenizer files into the same folder"
            ) from error

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """``[B, F]`` of texts; longer ones than the model takes are cut."""
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self._device)
        return embedding(self._model.get_text_features(**tokens)).float()
