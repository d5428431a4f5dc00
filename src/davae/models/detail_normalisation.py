"""The statistics of the detail channels, kept in the config, and the map between raw and pipeline latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models.base_adapters import constructor_arguments
from davae.models.levels import OnABase


class DetailNormalisation(OnABase):
    """Per-channel mean and standard deviation of ``z_d``, level by level.

    Every level keeps the statistics of its own channels in its own config. Networks see raw details; the
    statistics apply where pipelines hand latents in and out. They may thus be measured, and measured again, after
    a training, and a level means the same to the transformer whatever is added above it.
    """

    own_layout: LatentLayout
    config: Any

    def set_detail_statistics(self, mean: Tensor, std: Tensor, *, level: int | None = None) -> None:
        """Keep mean and standard deviation of raw ``z_d`` per channel; encode and decode normalise with them.

        They stand in the config.

        Args:
            mean, std: ``[D]``, of the channels that the level adds.
            level: which level, 1 the lowest; None is the last one.

        Raises:
            DavaeError: another length, a value that is not finite, or a standard deviation of 0.
        """
        if level is not None and level != self._number():
            if self.below is None:
                raise DavaeError(f"there is no level {level} of details: the lowest is {self._number()}")
            self.below.set_detail_statistics(mean, std, level=level)
            # The config of this level holds the one below, and is what a saved model is made from.
            arguments = constructor_arguments(type(self.below), self.below.config)
            self.register_to_config(base_config=arguments)  # type: ignore[attr-defined]
            return
        count = self.own_layout.detail_channels
        for name, values in (("mean", mean), ("std", std)):
            if values.shape != (count,) or not values.isfinite().all():
                raise DavaeError(
                    f"detail {name} must be {count} finite values, not {tuple(values.shape)}: {values}"
                )
        if not (std > 0).all():
            raise DavaeError(
                f"detail channel {int((std <= 0).nonzero()[0])} is constant: its standard deviation is 0"
            )
        self.register_to_config(detail_mean=mean.tolist(), detail_std=std.tolist())  # type: ignore[attr-defined]

    def detail_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw ``z_d``, float32 ``[D]`` each on the CPU, all levels."""
        count, config = self.own_layout.detail_channels, self.config
        mean = torch.tensor(config.detail_mean or [0.0] * count, dtype=torch.float32)
        std = torch.tensor(config.detail_std or [1.0] * count, dtype=torch.float32)
        if self.below is None:
            return mean, std
        mean_below, std_below = self.below.detail_statistics()
        return torch.cat([mean_below, mean]), torch.cat([std_below, std])

    def _detail_affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``mean`` and ``std``, ``[D, 1, 1]``, with ``z_d = x_d * std + mean`` for a pipeline's ``x_d``.

        Args:
            device: of ``x_d``; the model's own says nothing while its weights are offloaded.
        """
        mean, std = (values.to(device) for values in self.detail_statistics())
        scaling, shift = self.config.scaling_factor or 1.0, self.config.shift_factor or 0.0
        return (mean - shift * scaling * std)[:, None, None], (scaling * std)[:, None, None]

    def _number(self) -> int:
        return 1 if self.below is None else 1 + self.below._number()
