"""The images of a recipe's data section."""

from __future__ import annotations

from typing import Literal

from davae.data import ImageDataset, RenderedDataset, open_dataset
from davae.training.settings import DataSettings


def open_part(data: DataSettings, part: Literal["train", "held_out"]) -> ImageDataset | RenderedDataset:
    """The training or the held-out part; held-out images are never mirrored or cropped at random."""
    training = part == "train"
    return open_dataset(
        data.path,
        resolution=data.resolution,
        crop=data.crop if training else "center",
        flip=data.flip and training,
        split=data.split,
        hold_out=data.hold_out,
        part=part,
    )
