"""Prefixes of latent channels (DC-AE 1.5, arXiv 2508.00413): some samples are trained on their first channels alone.

>>> prefix_mask(torch.tensor([1, 3]), 3).flatten(1)
tensor([[1., 0., 0.],
        [1., 1., 1.]])
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from davae.errors import DavaeError


def prefix_mask(counts: Tensor, channels: int) -> Tensor:
    """``[B, channels, 1, 1]``: 1 for the first ``counts[b]`` channels of sample ``b``, else 0."""
    return (torch.arange(channels, device=counts.device) < counts[:, None]).float()[:, :, None, None]


@dataclass(frozen=True)
class ChannelPrefixes:
    """Which samples keep only their first channels, and how many.

    A sample keeps all channels with probability ``1 - share``, else a prefix; every prefix is as likely.

    Args:
        channels: of the whole latent.
        prefixes: numbers of channels; none for no prefixes at all.
        share: of the samples that get a prefix, in [0, 1).

    Raises:
        DavaeError: a prefix that is not shorter than the latent, or a share outside [0, 1).
    """

    channels: int
    prefixes: Sequence[int] = ()
    share: float = 0.5

    def __post_init__(self) -> None:
        wrong = [count for count in self.prefixes if not 0 < count < self.channels]
        if wrong:
            raise DavaeError(
                f"loss.prefixes.channels: {wrong[0]} is no prefix of a latent of {self.channels} channels; take "
                f"1 to {self.channels - 1}, all {self.channels} are trained anyway"
            )
        if not 0 <= self.share < 1:
            raise DavaeError(f"loss.prefixes.share must be at least 0 and below 1, got {self.share}")

    def __bool__(self) -> bool:
        return bool(self.prefixes) and self.share > 0

    def draw(self, latent: Tensor) -> Tensor:
        """The `prefix_mask` of a batch ``[B, C, h, w]``, one number a sample from torch's CPU generator."""
        chosen = (torch.rand(len(latent)) / self.share * len(self.prefixes)).long()  # beyond the last: all channels
        counts = torch.tensor([*self.prefixes, self.channels])[chosen.clamp(max=len(self.prefixes))]
        return prefix_mask(counts, self.channels).to(latent)
