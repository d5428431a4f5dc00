"""Features of any image model of transformers (DINOv2, CLIP, ViT, ResNet) or, through it, of timm;
and of images and texts by CLIP."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file

from davae.errors import DavaeError, first_line
from davae.evaluation.features.network import Features, standardise
from davae.runtime.atomic_files import file_hash
from davae.runtime.model_files import open_model
from davae.runtime.pictures import to_bytes
from davae.runtime.resizing import resize_bicubic
from davae.runtime.text_files import read_object

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class TransformersFeatures:
    """Pooled features of a transformers model.

    The features are the image embedding of a text-image model (CLIP, SigLIP), else the pooler's output, else,
    if there is no pooler or its weights are missing, the mean over positions. Whole images are resized to the model's
    side; mean and standard deviation are the model's own.

    Args:
        name: a folder, or a name on the hub.
        device: to compute on.

    Raises:
        DavaeError: nothing can be loaded, or weights other than the pooler's are missing.
    """

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        self.name = name
        self._device = device
        try:
            self._model, info = open_model(
                AutoModel.from_pretrained, name, optional=("pooler",), trust_remote_code=False
            )
        except ImportError as error:  # the wrapper of timm's networks needs timm
            raise DavaeError(f"feature network '{name}': {first_line(error)}. Install it with pip") from error
        except DavaeError as error:
            raise DavaeError(f"feature network '{name}': {error}") from error
        except (OSError, ValueError, KeyError) as error:
            raise DavaeError(
                f"feature network '{name}': not 'inception', not 'efficientnet-lite0', and no transformers model can "
                f"be loaded from a folder or hub name of that kind ({first_line(error)}). Where there is no network, "
                f"fetch it elsewhere with `hf download {name} --local-dir FOLDER` and give the folder"
            ) from error
        self._has_pooler = not any("pooler" in key for key in info["missing_keys"])
        self._model.to(device).eval().requires_grad_(False)
        found = _beside(name, "preprocessor_config.json")
        stored = read_object(found) if found else {}
        self._side, self._mean, self._std = preprocessing(self._model.config, stored)
        self._pooled = "unknown until used"

    def describe(self) -> dict[str, Any]:
        """See `FeatureNetwork`."""
        weights = self._weights_file()
        return {
            "network": f"{type(self._model).__name__} {self.name}",
            "weights": None if weights is None else weights.name,
            "weights_sha256": None if weights is None else file_hash(weights),
            "features": self._pooled,
            "resize": f"bicubic, antialiased, to {self._side} x {self._side}, aspect ratio not kept",
            "range": f"8 bits, / 255, mean {list(self._mean)}, std {list(self._std)}",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """See `FeatureNetwork`."""
        x = resize_bicubic(to_bytes(images.to(self._device)), self._side, self._side)
        x = standardise(x, self._mean, self._std).to(self._model.dtype)
        if hasattr(self._model, "get_image_features"):
            self._pooled = "image embedding"
            return Features(embedding(self._model.get_image_features(pixel_values=x)).float())
        out = self._model(pixel_values=x)
        pooled = getattr(out, "pooler_output", None)
        if pooled is not None and self._has_pooler:
            self._pooled = "pooler output"
            return Features(pooled.flatten(1).float())
        last = out.last_hidden_state
        self._pooled = "mean over positions"
        return Features((last.mean(dim=1) if last.ndim == 3 else last.mean(dim=(2, 3))).float())

    def _weights_file(self) -> Path | None:
        return next((found for name in _WEIGHTS if (found := _beside(self.name, name))), None)


def preprocessing(config: Any, stored: Mapping[str, Any]) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Side in pixels, and mean and standard deviation per channel, that a network was trained with.

    Args:
        config: the model's; timm's own settings are in its ``pretrained_cfg``.
        stored: content of ``preprocessor_config.json``, empty if there is none.
    """
    timm = getattr(config, "pretrained_cfg", None) or {}
    config = getattr(config, "vision_config", config)
    size = stored.get("crop_size") or stored.get("size") or {}
    side = size if isinstance(size, int) else size.get("height") or size.get("shortest_edge")
    side = side or timm.get("input_size") or getattr(config, "image_size", None) or 224
    return (
        max(side) if isinstance(side, list | tuple) else int(side),
        tuple(stored.get("image_mean") or timm.get("mean") or _IMAGENET_MEAN),
        tuple(stored.get("image_std") or timm.get("std") or _IMAGENET_STD),
    )


def embedding(output: Any) -> Tensor:
    """``[B, F]``; newer versions of transformers wrap the tensor that older ones return."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _beside(name: str, file: str) -> Path | None:
    """A file in a model's folder or, for a hub model, in the local cache."""
    found = cached_file(
        name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
    )  # fmt: skip
    return None if found is None else Path(found)


class TextImageNetwork(TransformersFeatures):
    """A transformers model with ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP) and its tokenizer.

    Raises:
        DavaeError: it cannot be loaded, or has no text encoder or tokenizer.
    """

    def __init__(self, name: str, *, device: str | torch.device = "cpu") -> None:
        super().__init__(name, device=device)
        if not hasattr(self._model, "get_text_features"):
            raise DavaeError(f"a CLIP score needs a model of images and texts; {type(self._model).__name__} has none")
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DavaeError(f"'{name}' has no tokenizer: fetch its tokenizer files into the same folder") from error

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[B, F]`` of texts; texts that are too long for the model are truncated."""
        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(texts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).to(self._device)
        return embedding(self._model.get_text_features(**tokens)).float()
