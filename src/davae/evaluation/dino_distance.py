"""A perceptual distance through the layers of a DINO network; needs transformers alone and a folder of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel

from davae.errors import DavaeError
from davae.runtime.atomic_files import file_hash

LARGEST_SIDE = 512
"""Larger images are reduced to this longer side first."""
_EXAMPLE = "facebook/dinov2-base"
_WEIGHTS = "model.safetensors"


class DinoDistance(nn.Module):
    """Distance of image pairs as the package dino-perceptual defines it, for DINOv2, DINOv3 and other transformers.

    Of every layer l all tokens (class, register and patch tokens) are brought to length 1, and

        d(x, y) = mean over layers, tokens and features of (f_l(x) - f_l(y))^2,   f_l = h_l / |h_l|

    Values are small (a squared distance of unit vectors, divided by their width): as a loss next to L1, weights
    of 250 to 1000 are usual. Pixels right and below of the last whole patch are not seen.

    Args:
        backbone: folder of a transformers model (``config.json`` and ``model.safetensors``). Nothing is downloaded.

    Raises:
        DavaeError: no such folder, weights that are missing or incomplete, or a network without token layers.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: str | Path | None) -> None:
        super().__init__()
        self.folder = Path(backbone) if backbone else None
        if self.folder is None or not (self.folder / _WEIGHTS).is_file():
            raise DavaeError(
                f"the DINO distance needs a backbone: looked for {_WEIGHTS} in {backbone!r}. Fetch one where there is "
                f"a network, such as `hf download {_EXAMPLE} --local-dir FOLDER`, and give the folder"
            )
        try:
            self.network, info = AutoModel.from_pretrained(
                self.folder, local_files_only=True, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise DavaeError(f"{self.folder} holds no model that transformers can load: {error}") from error
        lacking = sorted(key for key in info["missing_keys"] if "pooler" not in key)
        if lacking:
            raise DavaeError(f"{self.folder}: the weights lack {lacking[0]} and {len(lacking) - 1} more")
        if not getattr(self.network.config, "num_hidden_layers", 0):
            raise DavaeError(
                f"{self.folder} holds a {type(self.network).__name__}: the DINO distance needs a vision transformer"
            )
        self.network.requires_grad_(False).eval()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1), persistent=False)

    def describe(self) -> dict[str, Any]:
        """Weights with their SHA-256, and the preprocessing."""
        assert self.folder is not None
        return {
            "network": f"{type(self.network).__name__} {self.folder}",
            "weights": _WEIGHTS,
            "weights_sha256": file_hash(self.folder / _WEIGHTS),
            "features": "all tokens of every layer, each of length 1",
            "resize": f"bicubic where the longer side is over {LARGEST_SIDE}",
            "range": f"mean {self.mean.flatten().tolist()}, std {self.std.flatten().tolist()}",
        }

    def train(self, mode: bool = True) -> DinoDistance:
        """Stays in evaluation mode: a distance has no dropout."""
        return super().train(False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Distances ``[B]`` of pairs ``[B, 3, H, W]`` in [-1, 1]; gradients reach ``reconstruction`` alone."""
        with torch.no_grad():
            wanted = self._layers(images)
        found = self._layers(reconstruction)
        each = [(a - b).square().mean(dim=(1, 2)) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(each).mean(dim=0)

    def _layers(self, images: Tensor) -> list[Tensor]:
        x = (images.float() + 1) / 2
        longer = max(x.shape[-2:])
        if longer > LARGEST_SIDE:
            size = [max(1, round(side * LARGEST_SIDE / longer)) for side in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
        layers = self.network((x - self.mean) / self.std, output_hidden_states=True).hidden_states
        return [F.normalize(layer.float(), dim=-1, eps=1e-6) for layer in layers[1:]]  # [B, tokens, width]
