"""Another patch size and QK-norm: what stays of the model that one starts from."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from davae.errors import DavaeError
from davae.models import LightningDiTTransformer2DModel
from davae.models.lightningdit import restarted


def model(**options: object) -> LightningDiTTransformer2DModel:
    torch.manual_seed(0)
    arguments = {"sample_size": 4, "patch_size": 1, "in_channels": 3, "num_classes": 5, **options}
    made = LightningDiTTransformer2DModel(hidden_size=16, num_layers=2, num_attention_heads=2, **arguments)
    for parameter in made.parameters():  # zeros at the start would hide mistakes
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


@torch.no_grad()
@pytest.mark.parametrize("patch", [1, 2])
def test_larger_patches_do_to_enlarged_latents_what_small_ones_did(patch: int) -> None:
    base = model(patch_size=patch)
    wide = restarted(base, sample_size=8, patch_size=2 * patch)
    assert wide.config.patch_size == 2 * patch
    assert wide.config.sample_size == 8
    time, label = torch.tensor([0.3]), torch.tensor([2])
    # Latents in which each of the larger patches holds the old patch, tiled: the mean over it is the old token.
    latent = torch.randn(1, 3, 4, 4)
    tiles = latent.unfold(2, patch, patch).unfold(3, patch, patch).repeat(1, 1, 1, 1, 2, 2)
    tiled = tiles.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 8, 8)
    small, large = base(latent, time, label).sample, wide(tiled, time, label).sample
    places = small.unfold(2, patch, patch).unfold(3, patch, patch).repeat(1, 1, 1, 1, 2, 2)
    torch.testing.assert_close(large, places.permute(0, 1, 2, 4, 3, 5).reshape(1, 3, 8, 8))


@torch.no_grad()
def test_qk_norm_is_put_in_with_weight_one_and_changes_the_model() -> None:
    base = model()
    normed = restarted(base, qk_norm=True)
    assert normed.config.qk_norm
    assert not base.config.qk_norm
    added = normed.state_dict().keys() - base.state_dict().keys()
    assert len(added) == 4
    assert all((normed.state_dict()[name] == 1).all() for name in added)
    assert all(torch.equal(normed.state_dict()[name], value) for name, value in base.state_dict().items())
    inputs = torch.randn(1, 3, 4, 4), torch.tensor([0.3]), torch.tensor([2])
    assert not torch.allclose(normed(*inputs).sample, base(*inputs).sample)


def test_nothing_asked_gives_a_copy() -> None:
    base = model()
    same = restarted(base)
    assert same is not base
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), same.parameters(), strict=True))


def test_what_cannot_be_started_is_told() -> None:
    with pytest.raises(DavaeError, match="patch_size 3 is no multiple of the base's 2"):
        restarted(model(patch_size=2), patch_size=3)
    with pytest.raises(DavaeError, match="only a LightningDiT"):
        restarted(nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(DavaeError, match="cannot be removed"):
        restarted(model(qk_norm=True), qk_norm=False)
