"""LPIPS (Zhang et al., 2018), an optional part: it needs two packages and a downloaded backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.runtime.atomic_files import file_hash
from davae.runtime.weight_files import read_state_dict

_BACKBONE_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


class LpipsLoss(nn.Module):
    """LPIPS with the VGG-16 backbone, frozen.

    Args:
        backbone: file of torchvision's VGG-16 weights (``.safetensors``, or ``.pth`` read with
            ``weights_only=True``).

    Raises:
        DavaeError: the ``lpips`` extra is not installed, or the backbone file is missing or holds other weights.
    """

    def __init__(self, backbone: str | None) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise DavaeError(
                "LPIPS is asked for, but not installed: pip install 'davae[lpips]'; a training can do without: "
                "reconstruction.lpips_weight=0 and laplacian_weight, which needs nothing"
            ) from error
        if backbone is None or not Path(backbone).is_file():
            raise DavaeError(
                f"LPIPS needs torchvision's VGG-16 weights: {backbone!r} (reconstruction.lpips_backbone, --lpips) is "
                f"no file. Fetch {_BACKBONE_URL} where there is a network and give its path"
            )
        self.file = Path(backbone)
        weights = read_state_dict(backbone)
        self.network = lpips.LPIPS(net="vgg", pretrained=True, pnet_rand=True, verbose=False)
        features = {k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")}
        with torch.no_grad():
            for name, parameter in self.network.net.named_parameters():
                key = name.split(".", 1)[1]  # slice3.10.weight is torchvision's features.10.weight
                _check_layer(backbone, f"features.{key}", features.get(key), parameter)
                parameter.copy_(features[key])
        self.network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LpipsLoss:
        """LPIPS stays in evaluation mode."""
        return super().train(False)

    def describe(self) -> dict[str, Any]:
        """Weights with their SHA-256, and the preprocessing."""
        return {
            "network": "LPIPS, VGG-16",
            "weights": self.file.name,
            "weights_sha256": file_hash(self.file),
            "resize": "none",
        }

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Distances ``[B]`` of pairs ``[B, 3, H, W]`` in [-1, 1]."""
        return self.network(images.float(), reconstruction.float()).flatten()


def _check_layer(file: str, key: str, found: Tensor | None, wanted: Tensor) -> None:
    """Whether the file has a tensor of that name and size.

    Raises:
        DavaeError: naming both.
    """
    if found is not None and found.shape == wanted.shape:
        return
    what = "has no tensor" if found is None else f"has another size ({tuple(found.shape)}) of"
    raise DavaeError(
        f"{file} {what} '{key}', of shape {tuple(wanted.shape)} in torchvision's VGG-16: it is another network's file. "
        f"LPIPS needs {_BACKBONE_URL}"
    )
