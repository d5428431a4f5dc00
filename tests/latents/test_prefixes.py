"""Prefixes of channels: the masks by hand, how often each is drawn, and what is refused."""

from __future__ import annotations

import pytest
import torch

from davae.errors import DavaeError
from davae.latents import ChannelPrefixes
from davae.latents.prefixes import prefix_mask


def test_a_mask_by_hand() -> None:
    mask = prefix_mask(torch.tensor([1, 4, 3]), 4)
    assert mask.shape == (3, 4, 1, 1)
    assert mask.flatten(1).tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]


def test_every_prefix_is_as_likely_and_the_rest_keeps_all_channels() -> None:
    torch.manual_seed(0)
    latent = torch.zeros(40_000, 8, 1, 1, dtype=torch.bfloat16)
    mask = ChannelPrefixes(8, [2, 5], share=0.6).draw(latent)
    assert mask.dtype == latent.dtype
    counts = mask.float().sum((1, 2, 3))
    found = {int(n): float((counts == n).float().mean()) for n in counts.unique()}
    assert found == pytest.approx({2: 0.3, 5: 0.3, 8: 0.4}, abs=0.01)
    assert torch.equal(mask, prefix_mask(counts.long(), 8).to(latent))


def test_a_draw_takes_one_number_a_sample() -> None:
    """So that processes can draw their rows of the whole batch."""
    torch.manual_seed(0)
    ChannelPrefixes(8, [2, 5]).draw(torch.zeros(6, 8, 3, 3))
    after = torch.rand(1)
    torch.manual_seed(0)
    torch.rand(6)
    assert torch.equal(after, torch.rand(1))


def test_without_prefixes_or_share_there_is_nothing_to_draw() -> None:
    assert not ChannelPrefixes(8)
    assert not ChannelPrefixes(8, [2], share=0.0)
    assert ChannelPrefixes(8, [2], share=0.1)


@pytest.mark.parametrize(
    ("prefixes", "share", "words"),
    [
        ([4, 8], 0.5, r"prefixes\.channels: 8 is no prefix of a latent of 8 channels; take 1 to 7"),
        ([0], 0.5, r"prefixes\.channels: 0 is no prefix"),
        ([4], 1.0, r"prefixes\.share must be at least 0 and below 1, got 1\.0"),
    ],
)
def test_what_is_no_prefix_is_refused(prefixes: list[int], share: float, words: str) -> None:
    with pytest.raises(DavaeError, match=words):
        ChannelPrefixes(8, prefixes, share)
