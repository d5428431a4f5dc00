"""PatchGAN discriminator and the hinge losses of discriminator and generator."""

import torch.nn.functional as F
from torch import Tensor, nn


class PatchDiscriminator(nn.Module):
    """Classifies overlapping patches: images ``[B, 3, H, W]`` in [-1, 1] to logits ``[B, 1, h, w]``.

    4x4 convolutions: ``layers`` of stride 2 with doubling width (at most 8 times ``filters``), one of stride
    1, and one to a single channel; batch norm after all but the first and last, leaky ReLU of slope 0.2 (Isola et al.
    2017, arXiv 1611.07004).

    Args:
        filters: width of the first layer.
        layers: number of layers of stride 2.
    """

    def __init__(self, filters: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, filters, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = filters
        for level in range(1, layers + 1):
            previous, width = width, filters * min(2**level, 8)
            stride = 2 if level < layers else 1
            parts += [
                nn.Conv2d(previous, width, 4, stride=stride, padding=1, bias=False),  # the norm has the bias
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*parts, nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to logits ``[B, 1, h, w]``."""
        return self.main(images)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def hinge_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``(mean relu(1 - D(real)) + mean relu(1 + D(fake))) / 2`` of logits of any shape."""
    return 0.5 * (F.relu(1.0 - real.float()).mean() + F.relu(1.0 + fake.float()).mean())


def hinge_generator_loss(fake: Tensor) -> Tensor:
    """``-mean D(fake)`` of logits of any shape."""
    return -fake.float().mean()
