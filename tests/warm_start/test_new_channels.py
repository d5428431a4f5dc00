from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

from davae.latents import LatentLayout
from davae.warm_start import WarmStartError, channel_parameters, new_channel_masks, widen_channels
from tests.warm_start.models import VARIANTS, randomise


@pytest.mark.parametrize("variant", ["lightningdit-p2", "sd3"])
def test_masks_cover_exactly_what_widening_added(variant: str) -> None:
    model = randomise(VARIANTS[variant]())  # no zero among the old weights
    widened = widen_channels(model, base_channels=4, detail_channels=12)
    masks = new_channel_masks(widened, LatentLayout(4, 12))
    assert list(masks) == channel_parameters(widened) != []
    for name, mask in masks.items():
        assert torch.equal(mask, widened.get_parameter(name) == 0), name
        assert mask.sum() == widened.get_parameter(name).numel() - model.get_parameter(name).numel()


def test_an_adapter_on_a_widened_layer_is_named() -> None:
    widened = widen_channels(randomise(VARIANTS["sd3"]()), base_channels=4, detail_channels=12)
    widened.add_adapter(LoraConfig(r=2, target_modules=["proj_out"]))
    for names in (channel_parameters, lambda model: new_channel_masks(model, LatentLayout(4, 12))):
        with pytest.raises(WarmStartError, match=r"proj_out\.weight.*LoRA.*targets"):
            names(widened)
