"""The Inception network of published FID, KID and Inception Score, from a file of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.features.inception_network import InceptionNetwork
from davae.evaluation.features.network import Features
from davae.evaluation.features.resize import resize_tensorflow1
from davae.runtime.atomic_files import file_hash
from davae.runtime.pictures import to_bytes

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
_SIDE = 299


class Inception:
    """2048 pooled features and 1008 logits of the TensorFlow network of December 2015, as torch-fidelity has it.

    Args:
        file: the weights; none looks where torch-fidelity leaves them, in torch's hub folder.
        device: where it computes.

    Raises:
        DavaeError: no such file, or other weights.
    """

    name = "inception"

    def __init__(self, file: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        self._file = Path(file) if file else Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
        if not self._file.is_file():
            raise DavaeError(
                f"the Inception weights {WEIGHTS} are missing: looked for {self._file}. Fetch {_URL} where there is a "
                "network and put it there, or name its place with --features inception:FILE; efficientnet-lite0 "
                "needs no download from elsewhere, but its numbers are not comparable with published ones"
            )
        weights = torch.load(self._file, weights_only=True, map_location="cpu")
        with torch.device("meta"):
            self._network = InceptionNetwork()
        try:
            self._network.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise DavaeError(f"{self._file} does not hold the weights of {_URL}: {error}") from error
        self._network.to(device).eval().requires_grad_(False)
        self._device = device

    def describe(self) -> dict[str, Any]:
        """See `FeatureNetwork`."""
        return {
            "network": "Inception v3, TensorFlow 2015-12-05, as in torch-fidelity",
            "weights": self._file.name,
            "weights_sha256": file_hash(self._file),
            "features": "average-pooled last layer, 2048; logits without bias for the Inception Score",
            "resize": f"bilinear as in TensorFlow 1, to {_SIDE} x {_SIDE}, aspect ratio not kept",
            "range": "8 bits, then (x - 128) / 128",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """See `FeatureNetwork`."""
        x = resize_tensorflow1(to_bytes(images.to(self._device)), _SIDE, _SIDE)
        return Features(*self._network((x - 128) / 128))
