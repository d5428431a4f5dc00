from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from davae.latents import LatentLayout
from davae.warm_start import (
    ChannelDescription,
    ChannelPlace,
    WarmStartError,
    check_warm_start,
    describe,
    description_of,
    input_layer,
    output_layer,
    registry,
    widen_channels,
)
from tests.warm_start.models import VARIANTS, predict, randomise, sd3

LAYOUT = LatentLayout(4, 12)
LAYERS = {"sd3": ("pos_embed.proj", "proj_out"), "lightningdit-p2": ("patch_embed", "proj_out")}


def pair(variant: str, *, zero_head: bool = False) -> tuple[nn.Module, nn.Module]:
    model = randomise(VARIANTS[variant]())
    if zero_head:
        nn.init.zeros_(model.proj_out.weight)
        nn.init.zeros_(model.proj_out.bias)
    return model, widen_channels(model, base_channels=4, detail_channels=12)


@pytest.mark.parametrize("variant", LAYERS)
def test_report(variant: str) -> None:
    model, widened = pair(variant)
    report = check_warm_start(model, widened, LAYOUT)
    assert report.max_base_difference <= 1e-6
    assert report.max_base_difference_random <= 1e-6
    assert report.max_detail_output == 0
    assert report.dtype == torch.float32
    assert report.latent == (2, 4, 4, 8)
    assert report.layers == LAYERS[variant]
    assert "warm start verified" in str(report)
    assert "detail outputs are exactly 0" in str(report)


def new_input_weight(widened: nn.Module, embedder: nn.Module) -> None:
    embedder.weight[3, 9, 0, 1] = 1e-4


def swapped_input_channels(widened: nn.Module, embedder: nn.Module) -> None:
    embedder.weight.copy_(embedder.weight[:, torch.randperm(16)])


def detail_first_input(widened: nn.Module, embedder: nn.Module) -> None:
    embedder.weight.copy_(embedder.weight.roll(12, dims=1))


def input_bias(widened: nn.Module, embedder: nn.Module) -> None:
    embedder.bias[0] += 1e-3


def new_head_weight(widened: nn.Module, embedder: nn.Module) -> None:
    widened.proj_out.weight[16 + 5, 2] = 1e-6  # second position, detail channel 1


def new_head_bias(widened: nn.Module, embedder: nn.Module) -> None:
    widened.proj_out.bias[4] = 1e-6


def head_rows_channel_slowest(widened: nn.Module, embedder: nn.Module) -> None:
    for tensor in (widened.proj_out.weight, widened.proj_out.bias):
        tensor.copy_(tensor.unflatten(0, (4, 16)).transpose(0, 1).flatten(0, 1))


def first_rows_of_the_head(widened: nn.Module, embedder: nn.Module) -> None:
    # What plain zero padding does at patch 2: the old rows go to the first rows.
    old = widened.proj_out.weight.unflatten(0, (4, 16))[:, :4].flatten(0, 1).clone()
    widened.proj_out.weight.zero_()
    widened.proj_out.weight[:16] = old


def body(widened: nn.Module, embedder: nn.Module) -> None:
    widened.transformer_blocks[1].attn.to_q.weight[0, 0] += 1e-3


CORRUPTIONS: list[tuple[Callable[[nn.Module, nn.Module], None], str]] = [
    (new_input_weight, "input"),
    (swapped_input_channels, "input"),
    (detail_first_input, "input"),
    (input_bias, "input"),
    (new_head_weight, "proj_out"),
    (new_head_bias, "proj_out"),
    (head_rows_channel_slowest, "proj_out"),
    (first_rows_of_the_head, "proj_out"),
    (body, "transformer_blocks.1.attn.to_q"),
]


@pytest.mark.parametrize("variant", LAYERS)
@pytest.mark.parametrize(("corrupt", "layer"), CORRUPTIONS, ids=lambda value: getattr(value, "__name__", None))
def test_names_the_layer_that_leaks(variant: str, corrupt: Callable, layer: str) -> None:
    model, widened = pair(variant)
    name = LAYERS[variant][0] if layer == "input" else layer
    with torch.no_grad():
        corrupt(widened, widened.get_submodule(LAYERS[variant][0]))
    with pytest.raises(WarmStartError, match=f"layer {name} "):
        check_warm_start(model, widened, LAYOUT)


class TestWrongDescriptions:
    """Weights put where a wrong description says are consistent with it: only running the module shows it."""

    @pytest.fixture
    def redescribe(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
        def change(class_name: str, **changes: object) -> None:
            known = registry._DESCRIPTIONS[class_name]
            monkeypatch.setitem(registry._DESCRIPTIONS, class_name, dataclasses.replace(known, **changes))

        return change

    @pytest.mark.parametrize("zero_head", [False, True])
    def test_channel_order_of_the_head(self, redescribe: Callable[..., None], zero_head: bool) -> None:
        redescribe("SD3Transformer2DModel", outputs=output_layer("proj_out", "c p p"))
        with pytest.raises(WarmStartError, match=r"layer proj_out leaks.*'c p p'.*does not fit"):
            pair("sd3", zero_head=zero_head)

    def test_a_head_without_its_bias(self, redescribe: Callable[..., None]) -> None:
        redescribe("SD3Transformer2DModel", outputs=(ChannelPlace("proj_out.weight", 0, "p p c"),))
        with pytest.raises(WarmStartError, match=r"proj_out\.bias.*misses this place"):
            pair("sd3")

    def test_pattern_that_does_not_factor(self, redescribe: Callable[..., None]) -> None:
        redescribe("SD3Transformer2DModel", outputs=output_layer("proj_out", "p c"))
        with pytest.raises(WarmStartError, match=r"proj_out\.weight has shape \(16, 32\).*2 x 4 = 8"):
            pair("sd3")

    def test_unknown_letter(self, redescribe: Callable[..., None]) -> None:
        redescribe("SD3Transformer2DModel", outputs=output_layer("proj_out", "q c"))
        with pytest.raises(WarmStartError, match="uses q"):
            pair("sd3")

    def test_missing_layer(self, redescribe: Callable[..., None]) -> None:
        redescribe("SD3Transformer2DModel", inputs=input_layer("x_embedder"))
        with pytest.raises(WarmStartError, match=r"has no x_embedder\.weight"):
            pair("sd3")


class PackedInput(nn.Module):
    """A transformer's skeleton that flattens (channel, row, column) patches; body and head set by flags."""

    def __init__(self, channels: int, *, closed: bool = False, amplify: float = 1.0) -> None:
        super().__init__()
        self.config = {"in_channels": channels, "patch_size": 2}
        self.closed, self.amplify = closed, amplify
        self.embed = nn.Linear(4 * channels, 16)
        self.head = nn.Linear(16, 4 * channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        patches = nn.functional.pixel_unshuffle(x, 2).flatten(2).mT  # features (c p p)
        tokens = self.embed(patches)
        if self.amplify > 1:  # each turn carries a rounding about that much further
            for _ in range(4):
                tokens = torch.sin(self.amplify * tokens)
        features = self.head(0 * tokens if self.closed else tokens).mT.unflatten(2, (height // 2, width // 2))
        return nn.functional.pixel_shuffle(features, 2)


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.setattr(registry, "_DESCRIPTIONS", dict(registry._DESCRIPTIONS))

    def describe_packed(input_pattern: str) -> None:
        describe(
            "PackedInput",
            ChannelDescription(
                inputs=input_layer("embed", input_pattern),
                outputs=output_layer("head", "c p p"),
                dummy_inputs=lambda _model, latent, _generator: {"x": latent},
                counts={"in_channels": "c"},
            ),
        )

    return describe_packed


def widened_by_hand(model: PackedInput, pattern: str) -> PackedInput:
    wide = PackedInput(16, closed=model.closed, amplify=model.amplify)
    places = {p.parameter: p for p in description_of(model).places}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in places:
                wide.get_parameter(name).copy_(places[name].widen(parameter, {"p": 2}, LAYOUT))
            else:
                wide.get_parameter(name).copy_(parameter)
    return wide


def test_linear_patches_with_the_channel_slowest(described: Callable[[str], None]) -> None:
    described("c p p")
    model = randomise(PackedInput(4))
    assert check_warm_start(model, widened_by_hand(model, "c p p"), LAYOUT).max_base_difference <= 1e-6


def test_wrong_order_of_linear_patches(described: Callable[[str], None]) -> None:
    described("p p c")
    model = randomise(PackedInput(4))
    with pytest.raises(WarmStartError, match=r"layer embed leaks: its base channels.*'p p c'"):
        check_warm_start(model, widened_by_hand(model, "p p c"), LAYOUT)


def test_a_model_that_ignores_its_latent_proves_nothing(described: Callable[[str], None]) -> None:
    described("c p p")
    model = randomise(PackedInput(4, closed=True))
    with pytest.raises(WarmStartError, match="cannot be verified"):
        check_warm_start(model, widened_by_hand(model, "c p p"), LAYOUT)


def test_rounding_that_a_deep_model_carries_on_is_no_leak(described: Callable[[str], None]) -> None:
    described("c p p")
    model = randomise(PackedInput(4, amplify=6.0))
    report = check_warm_start(model, widened_by_hand(model, "c p p"), LAYOUT)
    assert report.tolerance > 1e-6
    assert report.max_base_difference <= report.tolerance <= 0.1


def test_neither_model_is_changed() -> None:
    model, widened = pair("lightningdit-p2")
    model.train()
    widened.train()
    widened.transformer_blocks[0].eval()
    modes = [module.training for module in widened.modules()]
    weights = [p.clone() for m in (model, widened) for p in m.parameters()]
    x = torch.randn(2, 16, 4, 4)
    state = torch.get_rng_state()
    check_warm_start(model, widened, LAYOUT)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in widened.modules()] == modes
    assert all(map(torch.equal, weights, (p for m in (model, widened) for p in m.parameters())))
    assert not any(module._forward_hooks for module in widened.modules())
    assert predict(widened.eval(), x).requires_grad  # gradients are on again


def test_damaged_weights() -> None:
    model, widened = pair("sd3")
    with torch.no_grad():
        for m in (model, widened):
            m.transformer_blocks[0].ff.net[2].weight[0, 0] = 1e38
            m.transformer_blocks[0].ff.net[2].bias[0] = float("inf")
    with pytest.raises(WarmStartError, match="not finite"):
        check_warm_start(model, widened, LAYOUT)


def test_a_class_is_described_once() -> None:
    known = description_of(sd3())
    describe("SD3Transformer2DModel", known)  # again the same is harmless
    with pytest.raises(WarmStartError, match="already described"):
        describe("SD3Transformer2DModel", dataclasses.replace(known, tokens=(4, 4)))


def test_learned_variance_pattern() -> None:
    # (p p 2 c): each half of a doubled head grows behind its own base channels.
    place = ChannelPlace("head.weight", 0, "2 c")
    head = torch.arange(1.0, 5.0).reshape(4, 1)  # 2 halves of 2 channels
    widened = place.widen(head, {}, LatentLayout(2, 1))
    assert widened.flatten().tolist() == [1, 2, 0, 3, 4, 0]
    base, detail = place.split(widened, {}, LatentLayout(2, 1))
    assert torch.equal(base, head)
    assert detail.flatten().tolist() == [0, 0]


def test_pattern_names_the_channel_once() -> None:
    with pytest.raises(WarmStartError, match="once"):
        ChannelPlace("head.weight", 0, "p p")
