"""What samplers ask data sets for."""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """Which item, in which epoch."""

    epoch: int
    position: int
