"""The Inception network of published FID, KID and Inception Score: the network, and its features from a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.evaluation.features.network import Features, resize_tensorflow1
from davae.runtime.atomic_files import file_hash
from davae.runtime.pictures import to_bytes
from davae.runtime.weight_files import read_finite

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
_SIDE = 299


class Inception:
    """2048 pooled features and 1008 logits of the TensorFlow network of December 2015, as in torch-fidelity.

    Args:
        file: the weights; by default torch-fidelity's, in torch's hub folder.
        device: to compute on.

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
        weights = read_finite(self._file)
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


class _Conv(nn.Module):
    def __init__(self, channels: int, out: int, kernel: tuple[int, int], stride: int, pad: bool) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=1, padding=1)


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 3, stride=2)


Step = tuple[str, int, tuple[int, int]]  # name, channels out, kernel
Link = Step | tuple[Step, Step]  # a pair forks: both see the same input
Branch = tuple[Callable[[Tensor], Tensor] | None, tuple[Link, ...]]  # pool before the chain


class _Block(nn.Module):
    """Branches side by side, joined along channels; ``halves`` gives the last convolution of each a stride of 2."""

    def __init__(self, channels: int, branches: tuple[Branch, ...], *, halves: bool = False) -> None:
        super().__init__()
        self._branches = branches
        for _, links in branches:
            inside = channels
            for position, link in enumerate(links):
                last = halves and position == len(links) - 1
                steps = _steps(link)
                for name, out, kernel in steps:
                    self.add_module(name, _Conv(inside, out, kernel, 2 if last else 1, pad=not last))
                inside = sum(out for _, out, _ in steps)

    def forward(self, x: Tensor) -> Tensor:
        made = []
        for pool, links in self._branches:
            y = x if pool is None else pool(x)
            for link in links:
                y = torch.cat([self.get_submodule(name)(y) for name, _, _ in _steps(link)], dim=1)
            made.append(y)
        return torch.cat(made, dim=1)


def _steps(link: Link) -> tuple[Step, ...]:
    return link if isinstance(link[0], tuple) else (link,)


def _block_a(channels: int, pooled: int) -> _Block:
    return _Block(
        channels,
        (
            (None, (("branch1x1", 64, (1, 1)),)),
            (None, (("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5)))),
            (None, (("branch3x3dbl_1", 64, (1, 1)), ("branch3x3dbl_2", 96, (3, 3)), ("branch3x3dbl_3", 96, (3, 3)))),
            (_average, (("branch_pool", pooled, (1, 1)),)),
        ),
    )


def _block_b(channels: int) -> _Block:
    triple: tuple[Link, ...] = (
        ("branch3x3dbl_1", 64, (1, 1)),
        ("branch3x3dbl_2", 96, (3, 3)),
        ("branch3x3dbl_3", 96, (3, 3)),
    )
    return _Block(channels, ((None, (("branch3x3", 384, (3, 3)),)), (None, triple), (_halve, ())), halves=True)


def _block_c(channels: int, inner: int) -> _Block:
    wide, tall = (1, 7), (7, 1)
    double: tuple[Link, ...] = (
        ("branch7x7dbl_1", inner, (1, 1)),
        ("branch7x7dbl_2", inner, tall),
        ("branch7x7dbl_3", inner, wide),
        ("branch7x7dbl_4", inner, tall),
        ("branch7x7dbl_5", 192, wide),
    )
    return _Block(
        channels,
        (
            (None, (("branch1x1", 192, (1, 1)),)),
            (None, (("branch7x7_1", inner, (1, 1)), ("branch7x7_2", inner, wide), ("branch7x7_3", 192, tall))),
            (None, double),
            (_average, (("branch_pool", 192, (1, 1)),)),
        ),
    )


def _block_d(channels: int) -> _Block:
    long: tuple[Link, ...] = (
        ("branch7x7x3_1", 192, (1, 1)),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, (3, 3)),
    )
    return _Block(
        channels,
        ((None, (("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3)))), (None, long), (_halve, ())),
        halves=True,
    )


def _block_e(channels: int, pool: Callable[[Tensor], Tensor]) -> _Block:
    fork = (("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1)))
    deep_fork = (("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1)))
    return _Block(
        channels,
        (
            (None, (("branch1x1", 320, (1, 1)),)),
            (None, (("branch3x3_1", 384, (1, 1)), fork)),
            (None, (("branch3x3dbl_1", 448, (1, 1)), ("branch3x3dbl_2", 384, (3, 3)), deep_fork)),
            (pool, (("branch_pool", 192, (1, 1)),)),
        ),
    )


class InceptionNetwork(nn.Module):
    """Images ``[B, 3, 299, 299]`` in [-1, 1) to pooled features ``[B, 2048]`` and logits without bias ``[B, 1008]``."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, (3, 3), 2, pad=False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, (3, 3), 1, pad=False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, (3, 3), 1, pad=True)
        self.Conv2d_3b_1x1 = _Conv(64, 80, (1, 1), 1, pad=False)
        self.Conv2d_4a_3x3 = _Conv(80, 192, (3, 3), 1, pad=False)
        self.Mixed_5b = _block_a(192, 32)
        self.Mixed_5c = _block_a(256, 64)
        self.Mixed_5d = _block_a(288, 64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, _average)
        self.Mixed_7c = _block_e(2048, _maximum)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled features and logits; the logits are without bias, as in the Inception Score."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # [B, 64, 147, 147]
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(_halve(x)))  # [B, 192, 71, 71]
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(_halve(x))))  # [B, 288, 35, 35]
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))  # [B, 768, 17, 17]
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # [B, 2048, 8, 8]
        rows = x.mean(dim=(2, 3))
        return rows, F.linear(rows, self.fc.weight)
