"""Gradient checkpointing keeps less for the way back and changes no number, over every base, whole and by tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.base_adapters import adapter as adapters
from davae.models.base_adapters.image import TinyAdapter
from tests.models.bases import NAMES, make_base


def _loss_and_kept_bytes(model: AutoencoderDA, images: Tensor) -> tuple[Tensor, int]:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        details = model.encode_own_details(images).mean
        decoded = model.decode_structured(model.encode_base(images), details)
        loss = decoded.square().mean() + details.square().mean()
    return loss, sum(kept.values())


@pytest.mark.parametrize("tiles", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("name", NAMES)
def test_less_is_kept_and_gradients_are_the_same(name: str, tiles: bool) -> None:
    model = AutoencoderDA.from_base(make_base(name), detail_channels=16, detail_dropout=0.0).train()
    if tiles:
        model.enable_tiling(tile_sample_min_height=48, tile_sample_min_width=64)
    images = torch.rand(1, 3, 64, 96) * 2 - 1
    results = []
    for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        switch()
        model.zero_grad()
        loss, kept = _loss_and_kept_bytes(model, images)
        loss.backward(retain_graph=True)
        loss.backward()  # adaptive weights go back through one graph more than once
        results.append((loss, kept, [parameter.grad / 2 for parameter in model.trained_parameters()]))
    (loss, kept, gradients), (again, kept_less, gradients_again) = results
    assert kept_less < 0.75 * kept
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients_again, gradients, rtol=1e-4, atol=1e-7)


def test_an_adapter_whose_networks_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(TinyAdapter):
        def detail_encoder(self, base: Any) -> nn.Module:
            return nn.Sequential(*base.encoder.layers[:-1])

    monkeypatch.setitem(adapters._ADAPTERS, "AutoencoderTiny", (AutoencoderTiny, Plain()))
    model = AutoencoderDA.from_base(make_base("tiny"), detail_channels=16)
    with pytest.raises(DavaeError, match="detail_encoder of Plain does not support gradient checkpointing"):
        model.enable_gradient_checkpointing()
