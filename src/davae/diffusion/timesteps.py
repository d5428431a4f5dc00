"""Noise levels for training: how `sigma`, the share of noise, is drawn.

``x_sigma = (1 - sigma) data + sigma noise``: 0 is data, 1 is noise. A model with ``t = 0`` at noise takes
``t = 1 - sigma``.

    >>> sample_sigmas(2, generator=torch.Generator().manual_seed(0), shift=3.0).shape
    torch.Size([2])
    >>> shift_sigmas(torch.tensor([0.0, 0.25, 1.0]), 3.0)
    tensor([0.0000, 0.5000, 1.0000])
"""

from dataclasses import dataclass

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from davae.choices import Scheme, check_choice
from davae.errors import DavaeError


def sample_unit(
    count: int,
    scheme: Scheme = "logit_normal",
    *,
    generator: torch.Generator | None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Numbers in [0, 1): uniform, or the sigmoid of a Gaussian (`mean`, `std`), float32 [count].

    Drawn on the generator's device (the CPU without one).

    Raises:
        DavaeError: an unknown scheme, or a standard deviation that is not positive.
    """
    check_choice(scheme, Scheme, "timestep scheme")
    device = generator.device if generator is not None else None
    if scheme == "uniform":
        return torch.rand(count, generator=generator, device=device)
    if not std > 0:
        raise DavaeError(f"the logit standard deviation must be positive, got {std}")
    return torch.sigmoid(mean + std * torch.randn(count, generator=generator, device=device))


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """``shift sigma / (1 + (shift - 1) sigma)``: above 1 favours noise. The inverse is ``1 / shift``.

    The same formula holds for ``t = 1 - sigma`` with the inverse shift: 0.3 in t is 1 / 0.3 in sigma.
    """
    if not shift > 0:
        raise DavaeError(f"the timestep shift must be positive, got {shift}")
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_sigmas(
    count: int,
    scheme: Scheme = "logit_normal",
    *,
    generator: torch.Generator | None = None,
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Shares of noise in [0, 1), float32 [count]: `sample_unit`, then `shift_sigmas`."""
    return shift_sigmas(sample_unit(count, scheme, generator=generator, mean=mean, std=std), shift)


@dataclass(frozen=True)
class SigmaTable:
    """Discrete noise levels, from noise down to data.

    Attributes:
        sigmas: float32 [n], falling from 1.
        timesteps: float32 [n], 1000 times as large up to rounding: what an SD3 transformer takes.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    def look_up(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Sigmas and truncated timesteps of entries ``int(n u)``.

        As in the official SD3 training; ``u`` near 0 is noise.

        Args:
            unit: in [0, 1), [B].

        Returns:
            sigmas float32 [B], timesteps int64 [B].
        """
        entry = (unit * len(self)).long().clamp(0, len(self) - 1).to(self.sigmas.device)
        return self.sigmas[entry], self.timesteps[entry].long()


def sd3_sigma_table(config_shift: float = 3.0, train_shift: float = 4.0, steps: int = 1000) -> SigmaTable:
    """The table of the official SD3 training: a scheduler made with one shift and then set to another.

    Its smallest sigma comes from the first shift and then gets the second on top (0.0119 for 3, 4 and 1000),
    so the table is not the plain shift of a uniform grid.

    Args:
        config_shift: shift in the base scheduler's configuration.
        train_shift: shift set afterwards.
        steps: entries of the table.
    """
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config_shift)
    scheduler.set_shift(train_shift)
    scheduler.set_timesteps(steps)
    return SigmaTable(scheduler.sigmas[:steps], scheduler.timesteps)
