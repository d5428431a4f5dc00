from __future__ import annotations

import pytest
import torch

from davae.errors import DavaeError
from davae.latents import LatentLayout, token_count


def test_base_stands_first_and_split_undoes_join() -> None:
    layout = LatentLayout(4, 12)
    z, z_d = torch.randn(2, 4, 3, 5), torch.randn(2, 12, 3, 5)
    latent = layout.join(z, z_d)
    assert layout.channels == 16
    assert layout.group_size == 3
    assert torch.equal(latent[:, layout.base], z)
    assert torch.equal(latent[:, layout.detail], z_d)
    assert torch.equal(latent[:, :4], z)
    assert all(torch.equal(a, b) for a, b in zip(layout.split(latent), (z, z_d)))


def test_errors_name_both_numbers() -> None:
    layout = LatentLayout(4, 12)
    with pytest.raises(DavaeError, match=r"15 channels, expected 16 \(4 base \+ 12 detail\)"):
        layout.split(torch.zeros(1, 15, 2, 2))
    with pytest.raises(DavaeError, match="detail latent has 4 channels, expected 12"):
        layout.join(torch.zeros(1, 4, 2, 2), torch.zeros(1, 4, 2, 2))
    with pytest.raises(DavaeError, match="differ in batch or grid"):
        layout.join(torch.zeros(1, 4, 2, 2), torch.zeros(1, 12, 4, 4))
    with pytest.raises(DavaeError, match="10 detail channels cannot be divided into 4"):
        _ = LatentLayout(4, 10).group_size
    with pytest.raises(DavaeError, match="base_channels must be at least 1, not 0"):
        LatentLayout(0, 4)


def test_token_count_by_hand() -> None:
    assert token_count(1024, 1024, spatial_compression=8, patch_size=2) == 64 * 64
    assert token_count(1024, 1024, spatial_compression=16, patch_size=2) == 32 * 32
    assert token_count(128, 64, spatial_compression=16) == 8 * 4
    with pytest.raises(DavaeError, match="use multiples of 32"):
        token_count(1000, 1024, spatial_compression=16, patch_size=2)


def test_a_base_alone_has_no_details() -> None:
    layout = LatentLayout(4, 0)
    latent = torch.randn(1, 4, 2, 2)
    z, z_d = layout.split(latent)
    assert torch.equal(z, latent)
    assert z_d.shape == (1, 0, 2, 2)
    with pytest.raises(DavaeError, match="detail_channels must be at least 0, not -1"):
        LatentLayout(4, -1)
