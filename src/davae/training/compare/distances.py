"""Distances of image sets by the features of networks: what the published tables tell beside PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from davae.evaluation.features import FeatureNetwork
from davae.evaluation.metrics.image_set import ImageSet, compare_sets


class FeatureReference:
    """Real images, whose features are computed once and compared with many sets.

    Args:
        networks: whose features; none is allowed and gives no distances.
        images: [N, 3, R, R] in [-1, 1].
        batch: images at a time.
    """

    def __init__(self, networks: Sequence[FeatureNetwork], images: Tensor, batch: int) -> None:
        self.networks, self.batch = list(networks), batch
        self._real = self.gather(images)

    def gather(self, images: Tensor) -> ImageSet:
        """Their features."""
        found = ImageSet(self.networks, spatial=False)
        return found.extend(images.split(self.batch)) if self.networks else found

    def distances(self, images: Tensor | ImageSet) -> dict[str, float]:
        """``fid/NETWORK``, ``kid/NETWORK``, ``precision/NETWORK`` and kin of images to the real ones."""
        found = self.gather(images) if isinstance(images, Tensor) else images
        return compare_sets(found, self._real).figures
