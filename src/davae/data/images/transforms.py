"""Conversion of images to tensors of one size. All randomness comes from a generator for one item.

An item's generator depends on ``(seed, epoch, index)`` only, so a resumed run, more loader
workers or another order of reading give the same crops.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from davae.choices import Crop, check_choice
from davae.errors import DavaeError

Size = tuple[int, int]
"""(width, height) in pixels, as in Pillow."""

_ZOOM = 1.25
"""Random crops show at least 1/1.25 = 80 % of the short side."""


def item_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random generator of one item in one epoch."""
    return np.random.default_rng((seed % 2**63, epoch, index))


def resize_to_cover(image: Image.Image, size: Size) -> Image.Image:
    """Scale an image to the smallest size that covers (width, height).

    Halves with a box filter while at least twice too large, then resizes once, bicubically: the preprocessing of guided
    diffusion (ADM), which is standard for class-conditional ImageNet models.
    """
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    factor = max(width / image.width, height / image.height)
    # One side comes out exactly; rounding must not leave the other short of its goal.
    target = (max(width, round(image.width * factor)), max(height, round(image.height * factor)))
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)


def image_to_tensor(image: Image.Image) -> Tensor:
    """An image as RGB, float32 ``[3, H, W]``, 0..255 mapped to [-1, 1]."""
    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # [H, W, 3] uint8
    return pixels.permute(2, 0, 1).contiguous().float() / 127.5 - 1.0


@dataclass(frozen=True)
class SquareCrop:
    """Resize and crop to ``resolution`` x ``resolution``, and mirror at random with ``flip``.

    ``crop="center"``: short side to ``resolution``, central square (ADM).
    ``crop="random"``: short side to a random length from ``resolution`` to 1.25 times it, without enlarging the image
    for that, and a random square. ``flip`` mirrors left and right with probability one half.
    """

    resolution: int
    crop: Crop = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        if self.resolution < 1:
            raise DavaeError(f"resolution must be a positive number of pixels, not {self.resolution}")
        check_choice(self.crop, Crop, "crop")

    def __call__(self, image: Image.Image, generator: np.random.Generator) -> Tensor:
        """An image of mode RGB to ``[3, R, R]`` in [-1, 1]."""
        return self.to_size(image, generator, (self.resolution, self.resolution))

    def to_size(self, image: Image.Image, generator: np.random.Generator, size: Size) -> Tensor:
        """The same for any size (width, height): ``[3, H, W]``."""
        width, height = size
        if self.crop == "center":
            image = resize_to_cover(image, size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
        else:
            # The limiting side becomes up to a quarter longer than needed, but is never enlarged for it.
            tight = width / image.width >= height / image.height
            side, has = (width, image.width) if tight else (height, image.height)
            longest = max(side, min(round(_ZOOM * side), has))
            zoom = int(generator.integers(side, longest, endpoint=True)) / side
            image = resize_to_cover(image, (round(width * zoom), round(height * zoom)))
            left = int(generator.integers(0, image.width - width, endpoint=True))
            top = int(generator.integers(0, image.height - height, endpoint=True))
        image = image.crop((left, top, left + width, top + height))
        if self.flip and generator.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image_to_tensor(image)
