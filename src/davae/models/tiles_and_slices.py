"""How an autoencoder goes through large inputs: by tiles, or one sample of the batch at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models.levels import OnABase
from davae.models.tiling import tiled


class TilesAndSlices(OnABase):
    """Tiling and slicing of an :class:`davae.AutoencoderDA`; the levels below follow its switches."""

    factor: int
    use_tiling: bool
    use_slicing: bool
    tile_sample_min_size: int
    tile_overlap_factor: float

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None
    ) -> None:
        """Encode and decode larger images in overlapping tiles; see :func:`davae.models.tiling.tiled`.

        Args:
            tile_sample_min_size: side of a tile in pixels of the full-resolution image, a multiple of ``s *
                f``.
            tile_overlap_factor: part of a tile that overlaps its neighbour, in [0, 0.5].

        Raises:
            DavaeError: a value out of range.
        """
        size = tile_sample_min_size or self.tile_sample_min_size
        factor = self.tile_overlap_factor if tile_overlap_factor is None else tile_overlap_factor
        if size % self.spatial_compression:
            raise DavaeError(f"tile size {size} is not a multiple of {self.spatial_compression} pixels")
        if not 0.0 <= factor <= 0.5:
            raise DavaeError(f"tile_overlap_factor must lie in [0, 0.5], not {factor}")
        self.use_tiling, self.tile_sample_min_size, self.tile_overlap_factor = True, size, factor
        if self.below is not None:  # the same tiles, in latent positions
            self.below.enable_tiling(size // self.factor, factor)

    def disable_tiling(self) -> None:
        """Encode and decode in one step."""
        self._switch("use_tiling", on=False)

    def enable_slicing(self) -> None:
        """Encode and decode one sample of a batch at a time."""
        self._switch("use_slicing", on=True)

    def disable_slicing(self) -> None:
        """Encode and decode whole batches."""
        self._switch("use_slicing", on=False)

    def _switch(self, name: str, *, on: bool) -> None:
        setattr(self, name, on)
        if self.below is not None:
            self.below._switch(name, on=on)

    def _tiled(
        self, function: Callable[[Tensor], Tensor], network: nn.Module, cell_in: int, cell_out: int
    ) -> Callable[[Tensor], Tensor]:
        """``function``, which calls ``network``, by tiles where tiling is on and the input larger than one."""
        tile = self.tile_sample_min_size // self.spatial_compression

        def apply(x: Tensor) -> Tensor:
            if not self.use_tiling or max(x.shape[-2:]) <= tile * cell_in:
                return function(x)
            overlap = round(tile * self.tile_overlap_factor)
            return tiled(
                function,
                x,
                tile=tile,
                overlap=overlap,
                cell_in=cell_in,
                cell_out=cell_out,
                networks=[network],
            )

        return apply

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, one sample at a time where slicing is on."""
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([function(part) for part in x.split(1)])
        return function(x)
