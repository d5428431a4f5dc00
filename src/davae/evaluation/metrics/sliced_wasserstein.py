"""Sliced Wasserstein distance between two sets of images, one value per level of their Laplacian pyramids.

The measure of Karras et al. 2018 (Progressive Growing of GANs, section 5): small patches of each pyramid
level are treated as points, normalised per colour channel and projected on random directions, and the
one-dimensional distances along these directions are averaged. The finest level contains the finest structure
only, so it distinguishes sharp textures from blurred or noisy ones even in otherwise similar images.

One difference: the published measure normalises each set by its own mean and standard deviation, so a set
with all its fine contrast halved gets a perfect score. By default both sets are normalised by their pooled
moments here; ``normalise="each"`` gives the published form.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.errors import DavaeError

Normalisation = Literal["pooled", "each"]
COARSEST_SIDE = 16
"""Levels are added while their shorter side has at least this many pixels (Karras et al. stop at 16)."""


def default_levels(height: int, width: int) -> int:
    """Number of pyramid levels whose shorter side is at least :data:`COARSEST_SIDE`; never below one."""
    levels, side = 1, min(height, width)
    while side % 2 == 0 and side // 2 >= COARSEST_SIDE:
        levels, side = levels + 1, side // 2
    return levels


def _blur(x: Tensor) -> Tensor:
    """Binomial 5x5 filter with mirrored borders, the generating kernel of Burt and Adelson 1983."""
    taps = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=x.device, dtype=x.dtype) / 16
    channels = x.shape[1]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    x = F.conv2d(x, taps.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(x, taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def laplacian_pyramid(images: Tensor, levels: int) -> list[Tensor]:
    """Band-pass levels of a batch, finest first; the last one is the remaining low-pass image.

    Args:
        images: [B, C, H, W].
        levels: number of levels; H and W must divide by ``2 ** (levels - 1)``.

    Returns:
        ``levels`` tensors [B, C, H / 2^i, W / 2^i]. One level is the image itself.

    Raises:
        DavaeError: the sides do not divide, or the coarsest level would be under 3 pixels.
    """
    height, width = images.shape[-2:]
    factor = 2 ** (levels - 1)
    if levels < 1 or height % factor or width % factor or (levels > 1 and min(height, width) // factor < 3):
        raise DavaeError(
            f"images of {height} x {width} have no Laplacian pyramid of {levels} levels; "
            f"use at most {default_levels(height, width)}"
        )
    pyramid = []
    for _ in range(levels - 1):
        coarse = _blur(images)[..., ::2, ::2]
        spread = torch.zeros_like(images)
        spread[..., ::2, ::2] = 4 * coarse  # three of four pixels are empty: times four keeps the mean
        pyramid.append(images - _blur(spread))
        images = coarse
    return [*pyramid, images]


class PatchSet:
    """Random patches of every pyramid level of a set of images, collected batch by batch.

    Collect the real images once and compare any number of generated sets with them. The i-th image of
    every set is cut at the same places, so a set has distance zero to itself, and the result does not
    depend on the split into batches.

    Args:
        levels: pyramid levels; by default all down to 16 pixels.
        patch: side of a patch in pixels.
        patches_per_image: patches cut from each image at each level.
        seed: decides where patches are cut.
    """

    def __init__(
        self, *, levels: int | None = None, patch: int = 7, patches_per_image: int = 128, seed: int = 0
    ) -> None:
        self.levels = levels
        self.patch = patch
        self.patches_per_image = patches_per_image
        self.seed = seed
        self.count = 0
        self._shape: tuple[int, ...] | None = None
        self._generators: list[torch.Generator] = []
        self._patches: list[list[Tensor]] = []

    def update(self, images: Tensor) -> PatchSet:
        """Add images [B, C, H, W] in [-1, 1]; all of one size. Returns the set itself."""
        if images.ndim != 4:
            raise DavaeError(f"images must be [B, C, H, W], got {list(images.shape)}")
        shape = tuple(images.shape[1:])
        if self._shape is None:
            self._shape = shape
            self.levels = self.levels or default_levels(*shape[1:])
            self._generators = [torch.Generator().manual_seed(self.seed + i) for i in range(self.levels)]
            self._patches = [[] for _ in range(self.levels)]
        if shape != self._shape:
            raise DavaeError(f"all images of a set must have one size: got {shape} after {self._shape}")
        assert self.levels is not None
        for level, band in enumerate(laplacian_pyramid(images.float(), self.levels)):
            self._patches[level].append(self._cut(band, self._generators[level]))
        self.count += len(images)
        return self

    def _cut(self, band: Tensor, generator: torch.Generator) -> Tensor:
        batch, channels, height, width = band.shape
        rows, columns = height - self.patch + 1, width - self.patch + 1
        if min(rows, columns) < 1:
            raise DavaeError(
                f"a pyramid level of {height} x {width} holds no {self.patch} x {self.patch} patch; "
                "use fewer levels or a smaller patch"
            )
        corner = torch.randint(rows * columns, (batch, self.patches_per_image), generator=generator)
        inside = torch.arange(self.patch)
        offset = (inside[:, None] * width + inside).flatten()  # [patch^2]
        index = (corner // columns * width + corner % columns)[..., None] + offset  # [B, P, patch^2]
        index = index.flatten(1)[:, None].expand(-1, channels, -1).to(band.device)
        points = band.flatten(2).gather(2, index)  # [B, C, P * patch^2]
        points = points.unflatten(2, (self.patches_per_image, -1))  # [B, C, P, patch^2]
        return points.transpose(1, 2).flatten(0, 1)  # [B * P, C, patch^2]

    def points(self, level: int) -> Tensor:
        """All patches of a level, [N, C, patch²], not normalised.

        Raises:
            DavaeError: no image was added.
        """
        if self.count == 0:
            raise DavaeError("the set of images is empty: call update(images) before comparing")
        if len(self._patches[level]) > 1:
            self._patches[level] = [torch.cat(self._patches[level])]
        return self._patches[level][0]

    def distance(
        self,
        other: PatchSet,
        *,
        projections: int = 512,
        order: Literal[1, 2] = 1,
        normalise: Normalisation = "pooled",
        chunk: int = 32,
    ) -> dict[int, float]:
        """Sliced Wasserstein distance to another set, level by level, finest (0) first.

        Args:
            other: a set cut with the same settings from images of the same size.
            projections: number of random directions, drawn from this set's seed.
            order: exponent of the one-dimensional distance; 1 is the published choice.
            normalise: moments used for the colour channels, see the top of this file.
            chunk: directions handled at once; bounds memory, does not change the result.

        Raises:
            DavaeError: the sets are empty or were cut differently.
        """
        first, second = self._settings(), other._settings()
        if first != second and self.count and other.count:
            raise DavaeError(f"the two sets were cut differently: {first} and {second}")
        if self.count == 0 or other.count == 0:
            raise DavaeError("the set of images is empty: call update(images) before comparing")
        assert self.levels is not None
        result = {}
        for level in range(self.levels):
            a, b = _normalised(self.points(level), other.points(level), normalise)
            generator = torch.Generator().manual_seed(self.seed + 7919 * (level + 1))
            directions = torch.randn(a.shape[1], projections, generator=generator).to(a)
            directions = F.normalize(directions, dim=0)
            total = 0.0
            for part in directions.split(chunk, dim=1):
                total += float((wasserstein_1d(a @ part, b @ part, order=order) ** order).double().sum())
            result[level] = (total / projections) ** (1 / order)
        return result

    def _settings(self) -> dict[str, object]:
        return {
            "image": self._shape,
            "levels": self.levels,
            "patch": self.patch,
            "patches_per_image": self.patches_per_image,
            "seed": self.seed,
        }


def _normalised(a: Tensor, b: Tensor, how: Normalisation) -> tuple[Tensor, Tensor]:
    """Zero mean and unit variance per channel, then flat points: [N, C, k] -> [N, C * k]."""
    mean_a, mean_b = (x.double().mean((0, 2), keepdim=True) for x in (a, b))
    var_a, var_b = (x.double().var((0, 2), keepdim=True, correction=0) for x in (a, b))
    if how == "pooled":
        # Each set counts the same whatever its size, which also keeps the distance symmetric.
        mean = (mean_a + mean_b) / 2
        var = (var_a + var_b) / 2 + (mean_a - mean_b) ** 2 / 4
        mean_a = mean_b = mean
        var_a = var_b = var
    elif how != "each":
        raise DavaeError(f"normalise must be 'pooled' or 'each', got {how!r}")
    a = (a - mean_a) / var_a.sqrt().clamp_min(1e-8)
    b = (b - mean_b) / var_b.sqrt().clamp_min(1e-8)
    return a.flatten(1).float(), b.flatten(1).float()


def wasserstein_1d(a: Tensor, b: Tensor, *, order: Literal[1, 2] = 1) -> Tensor:
    """Wasserstein distance of two samples of numbers, column by column.

    ``W_p = (integral over u in [0, 1] of |F_a^-1(u) - F_b^-1(u)|^p)^(1/p)``. The quantile functions of
    samples are step functions, so the integral is an exact finite sum, also for different sizes.

    Args:
        a: [n, k].
        b: [m, k].
        order: p, 1 or 2.

    Returns:
        [k].
    """
    a, b = a.sort(dim=0).values, b.sort(dim=0).values
    n, m = len(a), len(b)
    if n == m:
        return (a - b).abs().pow(order).mean(0) ** (1 / order)
    # Every place where one of the two step functions jumps, in units of 1 / (n m) so that it is exact.
    edges = torch.cat([torch.arange(n + 1) * m, torch.arange(1, m) * n]).unique().to(a.device)
    width = edges.diff()
    left = edges[:-1]
    gap = (a[left // m] - b[left // n]).abs().pow(order)
    return ((gap.double() * (width.double() / (n * m))[:, None]).sum(0) ** (1 / order)).to(a.dtype)


def sliced_wasserstein(
    a: Tensor,
    b: Tensor,
    *,
    levels: int | None = None,
    patch: int = 7,
    patches_per_image: int = 128,
    projections: int = 512,
    order: Literal[1, 2] = 1,
    normalise: Normalisation = "pooled",
    seed: int = 0,
    batch_size: int = 64,
) -> dict[int, float]:
    """Sliced Wasserstein distance between two sets of images, level by level, finest (0) first.

    Args:
        a: images [N, C, H, W] in [-1, 1].
        b: images [M, C, H, W] of the same size; N and M may differ.
        levels: pyramid levels; None takes all down to 16 pixels.
        patch: side of a patch.
        patches_per_image: patches cut from each image at each level.
        projections: number of random directions.
        order: 1 (published) or 2.
        normalise: ``"pooled"`` or ``"each"`` (published), see the top of this file.
        seed: decides patches and directions; the same seed gives the same number.
        batch_size: images handled at once; does not change the result.

    Returns:
        Level to distance in normalised units. Karras et al. print it times 1000.
    """
    sets = []
    for images in (a, b):
        one = PatchSet(levels=levels, patch=patch, patches_per_image=patches_per_image, seed=seed)
        for part in images.split(batch_size):
            one.update(part)
        sets.append(one)
    return sets[0].distance(sets[1], projections=projections, order=order, normalise=normalise)
