"""EfficientNet-Lite0: ImageNet features from two small packages, without any other download."""

from typing import Any

import torch
from torch import Tensor

from davae.evaluation.features.network import Features, standardise
from davae.models.perceptual import EFFICIENTNET_MEAN, EFFICIENTNET_STD, efficientnet_lite0
from davae.runtime.atomic_files import file_hash
from davae.runtime.pictures import to_bytes
from davae.runtime.resizing import resize_bicubic

_SIDE = 224
_MEAN, _STD = (EFFICIENTNET_MEAN,) * 3, (EFFICIENTNET_STD,) * 3


class EfficientNetLite0:
    """1280 pooled features and the logits of 1000 classes.

    Its distances are not comparable with those of Inception, but can be used to compare models with each other.

    Raises:
        DavaeError: the packages are not installed.
    """

    name = "efficientnet-lite0"

    def __init__(self, *, device: str | torch.device = "cpu") -> None:
        network, self._file = efficientnet_lite0()
        self._network: Any = network.to(device)
        self._device = device

    def describe(self) -> dict[str, Any]:
        """See `FeatureNetwork`."""
        return {
            "network": self.name,
            "weights": self._file.name,
            "weights_sha256": file_hash(self._file),
            "features": "average-pooled last layer, 1280",
            "resize": f"bicubic, antialiased, to {_SIDE} x {_SIDE}, aspect ratio not kept",
            "range": "8 bits, then (x - 127) / 128",
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """See `FeatureNetwork`."""
        x = resize_bicubic(to_bytes(images.to(self._device)), _SIDE, _SIDE)
        rows = self._network.extract_features(standardise(x, _MEAN, _STD)).mean(dim=(2, 3))
        return Features(rows, self._network._fc(rows))
