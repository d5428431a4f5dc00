from __future__ import annotations

import pytest
import torch
from torch import nn

from davae.models import PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss


def test_logits_cover_patches_of_70_pixels() -> None:
    discriminator = PatchDiscriminator().eval()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = discriminator(images)
    assert logits.shape == (1, 1, 14, 14)
    logits[0, 0, 7, 7].backward()
    assert images.grad is not None
    rows = images.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows[-1] - rows[0] + 1 == 70  # the receptive field of the usual three layers


def test_widths_double_up_to_eightfold() -> None:
    widths = [m.out_channels for m in PatchDiscriminator(4, 5).modules() if isinstance(m, nn.Conv2d)]
    assert widths == [4, 8, 16, 32, 32, 32, 1]


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert hinge_discriminator_loss(real, fake) == pytest.approx(0.5 * (0.25 + 0.5))
    assert hinge_generator_loss(fake) == pytest.approx(1.5)
