from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from davae.errors import DavaeError
from davae.models import ResidualDownsample, ResidualUpsample


def silence(block: ResidualDownsample | ResidualUpsample) -> None:
    """Only the shortcut is left."""
    nn.init.zeros_(block.conv.weight)
    nn.init.zeros_(block.conv.bias)  # type: ignore[arg-type]


def test_down_shortcut_averages_consecutive_unshuffled_channels() -> None:
    block = ResidualDownsample(3, 4, 2)
    silence(block)
    x = torch.arange(12.0).reshape(1, 3, 2, 2)  # unshuffled: channels 0..11 at one position
    assert block(x).flatten().tolist() == [1.0, 4.0, 7.0, 10.0]


def test_up_shortcut_repeats_channels_in_a_row() -> None:
    block = ResidualUpsample(2, 1, 2)
    silence(block)
    x = torch.tensor([5.0, 7.0]).reshape(1, 2, 1, 1)
    assert block(x).flatten().tolist() == [5.0, 5.0, 7.0, 7.0]


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_up_after_down_keeps_a_constant_image(factor: int) -> None:
    down, up = ResidualDownsample(2, 2 * factor**2, factor), ResidualUpsample(2 * factor**2, 2, factor)
    silence(down)
    silence(up)
    x = torch.randn(1, 2, 3 * factor, 2 * factor)
    assert torch.equal(up(down(x)), x)  # nothing to average, nothing to repeat: space to channel and back
    assert down(x).shape == (1, 2 * factor**2, 3, 2)


def test_learned_shortcut_starts_at_zero_where_counts_do_not_divide() -> None:
    x = torch.randn(1, 3, 4, 4)
    for block, branch in (
        (down := ResidualDownsample(3, 8, 2), lambda x: F.pixel_unshuffle(down.conv(x), 2)),
        (up := ResidualUpsample(3, 5, 2), lambda x: F.pixel_shuffle(up.conv(x), 2)),
    ):
        assert isinstance(block.shortcut_proj, nn.Conv2d)
        assert block.shortcut_proj.bias is None
        assert torch.equal(block(x), branch(x))
        block(x).square().sum().backward()
        assert block.shortcut_proj.weight.grad.abs().max() > 0  # type: ignore[union-attr]


def test_shortcut_can_be_left_out() -> None:
    down, up = ResidualDownsample(4, 8, 2, shortcut=False), ResidualUpsample(4, 2, 2, shortcut=False)
    silence(down)
    silence(up)
    assert not down(torch.randn(1, 4, 4, 4)).any()
    assert not up(torch.randn(1, 4, 4, 4)).any()


def test_channels_that_do_not_unshuffle() -> None:
    with pytest.raises(DavaeError, match="6 output channels are not a multiple of 2² = 4"):
        ResidualDownsample(4, 6, 2)


def test_blocks_can_be_exported() -> None:
    program = torch.export.export(ResidualUpsample(4, 2, 2).eval(), (torch.randn(1, 4, 3, 5),))
    assert "repeat_interleave" not in str(program.graph)
