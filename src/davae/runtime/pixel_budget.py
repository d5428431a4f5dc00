"""How many images an autoencoder takes at a time outside training steps: a budget of pixels, whatever their size.

The memory of encoding and decoding grows with the number of pixels. In float32 a megapixel takes about 2 GB in the
published KL autoencoders; a single larger image takes what it needs.
"""

from torch import Tensor

PIXELS = 2**20
_MOST = 32


def images_together(height: int, width: int) -> int:
    """The number of images of this size in pixels to encode or decode at a time: 1 from a megapixel on, at most 32."""
    return max(1, min(_MOST, PIXELS // (height * width)))


def in_parts(images: Tensor, compression: int = 1) -> tuple[Tensor, ...]:
    """Images ``[N, 3, H, W]``, or latents of such a compression per side, in parts to encode or decode at a time."""
    height, width = images.shape[-2:]
    return images.split(images_together(height * compression, width * compression))
