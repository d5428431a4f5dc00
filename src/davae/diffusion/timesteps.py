"""Sampling of the noise level `sigma` for training.

``x_sigma = (1 - sigma) data + sigma noise``: 0 is data, 1 is noise. A model with ``t = 0`` at noise takes
``t = 1 - sigma``.

    >>> sample_sigmas(2, generator=torch.Generator().manual_seed(0), shift=3.0).shape
    torch.Size([2])
    >>> shift_sigmas(torch.tensor([0.0, 0.25, 1.0]), 3.0)
    tensor([0.0000, 0.5000, 1.0000])
"""

import math
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
    """Random numbers in [0, 1): uniform, or the sigmoid of a Gaussian (`mean`, `std`), float32 [count].

    Drawn on the generator's device (the CPU without one).

    Raises:
        DavaeError: an unknown scheme, a negative count, a mean that is not finite, or a standard deviation that is not
            finite and above 0.
    """
    check_choice(scheme, Scheme, "timestep scheme")
    if count < 0:
        raise DavaeError(f"the count of noise levels must not be negative, got {count}")
    device = generator.device if generator is not None else None
    if scheme == "uniform":
        return torch.rand(count, generator=generator, device=device)
    if not 0 < std < math.inf or not math.isfinite(mean):
        raise DavaeError(f"the logits' standard deviation must be positive, their mean finite, got {std} and {mean}")
    logits = mean + std * torch.randn(count, generator=generator, device=device)
    return torch.sigmoid(logits).clamp(max=1 - 2**-24)  # large logits round to 1


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """``shift sigma / (1 + (shift - 1) sigma)``; a shift above 1 favours noise, and ``1 / shift`` is its inverse.

    The same formula applies to ``t = 1 - sigma`` with the inverse shift: 0.3 in t is 1 / 0.3 in sigma.

    Args:
        sigma: in [0, 1], any shape.
        shift: finite and above 0; 1 for no shift (other code may write 0).

    Raises:
        DavaeError: the shift is not finite and above 0.
    """
    check_shift(shift)
    return shift * sigma / (1 + (shift - 1) * sigma)


def check_shift(shift: float) -> None:
    """Raise a :class:`DavaeError` for a timestep shift that is not finite and above 0."""
    if not 0 < shift < math.inf:
        raise DavaeError(f"the timestep shift must be positive and finite (1 is none), got {shift}")


def sample_sigmas(
    count: int,
    scheme: Scheme = "logit_normal",
    *,
    generator: torch.Generator | None = None,
    shift: float = 1.0,
    mean: float = 0.0,
    std: float = 1.0,
) -> Tensor:
    """Noise levels, float32 [count]: `sample_unit`, then `shift_sigmas`; a shift above 1 may round some up to 1."""
    return shift_sigmas(sample_unit(count, scheme, generator=generator, mean=mean, std=std), shift)


@dataclass(frozen=True)
class SigmaTable:
    """Discrete noise levels, from noise to data.

    Attributes:
        sigmas: float32 [n], decreasing from 1.
        timesteps: float32 [n], ``1000 sigma`` up to rounding, as an SD3 transformer takes them.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.sigmas)

    def look_up(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Sigmas and truncated timesteps of entries ``int(n u)``, as in the official SD3 training.

        Args:
            unit: ``u`` in [0, 1), [B], where 0 is noise; values outside are clamped.

        Returns:
            sigmas float32 [B], timesteps int64 [B].
        """
        entry = (unit * len(self)).long().clamp(0, len(self) - 1).to(self.sigmas.device)
        return self.sigmas[entry], self.timesteps[entry].long()


def sd3_sigma_table(config_shift: float = 3.0, train_shift: float = 4.0, steps: int = 1000) -> SigmaTable:
    """The table of the official SD3 training: a scheduler created with one shift and then set to another.

    Its smallest sigma results from the first shift and is then shifted again by the second (0.0119 for 3, 4 and 1000),
    so the table is not simply a shifted uniform grid.

    Args:
        config_shift: shift in the base scheduler's configuration.
        train_shift: shift set afterwards.
        steps: entries of the table.

    Raises:
        DavaeError: a shift that is not finite and above 0, or no entries.
    """
    for shift in (config_shift, train_shift):
        check_shift(shift)
    if steps < 1:
        raise DavaeError(f"a table of noise levels needs at least one entry, not {steps}")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=config_shift)
    scheduler.set_shift(train_shift)
    scheduler.set_timesteps(steps)
    return SigmaTable(scheduler.sigmas[:steps], scheduler.timesteps)
