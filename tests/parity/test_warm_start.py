"""Widening against the authors' own: their SD3 branches, their zero-padded LightningDiT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig
from torch import Tensor

from davae.errors import DavaeError
from davae.interop.official_lightningdit import convert
from davae.interop.official_sd3_transformer import (
    from_official,
    from_official_order,
    load_transformer,
    to_official,
)
from davae.latents import LatentLayout
from davae.models.lightningdit import LightningDiTTransformer2DModel
from davae.warm_start import widen_channels
from tests.conftest import ParityCase, load_case, parity_cases, relative_error

TOLERANCE = 1e-5
SD3 = pytest.mark.parametrize("path", parity_cases("sd3_warm_start", having="original_output"))
ORDERS = {"forward": "base_first", "reverse": "detail_first"}
BRANCHES = {"extra.patch_embed": "pos_embed.proj.extra_conv", "extra.proj_out": "proj_out.extra_linear"}


def to_official_order(latent: Tensor, layout: LatentLayout, order: str) -> Tensor:
    """The inverse of `from_official_order`."""
    base, detail = layout.split(latent)
    return latent if order == "base_first" else torch.cat([detail, base], dim=1)


def original(case: ParityCase) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel(**case.info["config"]["transformer"]).eval()
    model.load_state_dict(case.state_dict(), strict=True)
    return model


def layout_of(case: ParityCase) -> LatentLayout:
    return LatentLayout(case.info["config"]["base_channels"], case.info["config"]["extra_channels"])


def official_weights(case: ParityCase) -> dict[str, Tensor]:
    """The case's branches with random extra weights under the official names."""
    state = case.state_dict()
    for layer, branch in (("pos_embed.proj", "base_conv"), ("proj_out", "base_linear")):
        for kind in ("weight", "bias"):
            state[f"{layer}.{branch}.{kind}"] = state.pop(f"{layer}.{kind}")
    for name, branch in BRANCHES.items():
        for kind in ("weight", "bias"):
            state[f"{branch}.{kind}"] = case.tensors[f"{name}.{kind}"]
    assert set(case.info["conventions"]["official_parameter_names"]) <= state.keys()
    return state


@torch.no_grad()
def predict(model: SD3Transformer2DModel, case: ParityCase, latent: Tensor) -> Tensor:
    names = ("encoder_hidden_states", "pooled_projections", "timestep")
    return model(latent, **{name: case.tensors[name] for name in names}).sample


@SD3
@pytest.mark.parametrize("direction", ORDERS)
def test_widened_sd3_equals_the_official_zero_start(path: Path, direction: str) -> None:
    case = load_case(path)
    layout, model = layout_of(case), original(case)
    widened = widen_channels(model, base_channels=layout.base_channels, detail_channels=layout.detail_channels)
    latent = from_official_order(case.tensors[f"{direction}.input"], layout, ORDERS[direction])
    assert torch.equal(latent[:, layout.base], case.tensors["base_channels_input"])
    output = predict(widened, case, latent)
    expected = case.tensors[f"{direction}.zero_init_output"]
    assert relative_error(to_official_order(output, layout, ORDERS[direction]), expected) < TOLERANCE
    assert relative_error(output[:, layout.base], case.tensors["original_output"]) < TOLERANCE
    assert output[:, layout.detail].count_nonzero() == 0


@SD3
@pytest.mark.parametrize("direction", ORDERS)
def test_official_branches_load_as_one_wider_layer(path: Path, direction: str) -> None:
    case = load_case(path)
    model, layout = load_transformer(official_weights(case), case.info["config"]["transformer"])
    assert layout == layout_of(case)
    latent = from_official_order(case.tensors[f"{direction}.input"], layout, ORDERS[direction])
    output = to_official_order(predict(model, case, latent), layout, ORDERS[direction])
    assert relative_error(output, case.tensors[f"{direction}.random_extra_output"]) < TOLERANCE


@SD3
def test_official_names_come_back(path: Path) -> None:
    case = load_case(path)
    official = official_weights(case)
    ours, layout = from_official(official)
    back = to_official(ours, layout)
    assert back.keys() == official.keys()
    summed = official["pos_embed.proj.base_conv.bias"] + official["pos_embed.proj.extra_conv.bias"]
    assert torch.equal(back.pop("pos_embed.proj.base_conv.bias"), summed)
    assert back.pop("pos_embed.proj.extra_conv.bias").count_nonzero() == 0
    assert all(torch.equal(tensor, official[name]) for name, tensor in back.items())
    again, _ = from_official(to_official(ours, layout))
    assert all(torch.equal(tensor, ours[name]) for name, tensor in again.items())


@SD3
def test_every_key_is_accounted_for(path: Path) -> None:
    case = load_case(path)
    config, official = case.info["config"]["transformer"], official_weights(case)
    name = next(name for name in official if name.startswith("transformer_blocks.0."))
    with pytest.raises(DavaeError, match=rf"missing: {name}"):
        load_transformer({k: v for k, v in official.items() if k != name}, config)
    with pytest.raises(DavaeError, match=r"missing: proj_out\.extra_linear\.bias"):
        load_transformer({k: v for k, v in official.items() if k != "proj_out.extra_linear.bias"}, config)
    with pytest.raises(DavaeError, match=r"unexpected: stranger"):
        load_transformer({**official, "stranger": torch.zeros(1)}, config)
    with pytest.raises(DavaeError, match=r"unexpected: proj_out\.weight"):
        load_transformer({**official, "proj_out.weight": torch.zeros(1)}, config)
    with pytest.raises(DavaeError, match=r"proj_out\.extra_linear\.weight has 4 rows"):
        load_transformer({**official, "proj_out.extra_linear.weight": torch.zeros(4, 32)}, config)
    with pytest.raises(DavaeError, match=rf"other shapes: {name}"):
        load_transformer({**official, name: torch.zeros(1)}, config)
    with pytest.raises(DavaeError, match="need"):
        to_official(from_official(official)[0], LatentLayout(16, 8))


@SD3
def test_official_lora_targets_match_the_same_modules(path: Path) -> None:
    case = load_case(path)
    settings = case.info["conventions"]["lora_settings"]
    layout = layout_of(case)
    model = widen_channels(original(case), base_channels=layout.base_channels, detail_channels=layout.detail_channels)
    model.add_adapter(LoraConfig(r=2, target_modules=settings["target_modules"]))
    matched = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if "lora_A" in name}
    assert matched == set(case.info["conventions"]["lora_matched_modules"])


class TestLightningDiT:
    """The official zero-padding of a pretrained model to more channels."""

    CASES = pytest.mark.parametrize("path", parity_cases("lightningdit", having="widened_output"))

    @staticmethod
    def widened(case: ParityCase) -> tuple[LightningDiTTransformer2DModel, LightningDiTTransformer2DModel]:
        config, state_dict = convert(case.state_dict())
        model = LightningDiTTransformer2DModel(**config).eval()
        model.load_state_dict(state_dict, strict=True)
        base, total = (case.info["config"][key]["in_channels"] for key in ("original", "widened"))
        return model, widen_channels(model, base_channels=base, detail_channels=total - base)

    @staticmethod
    @torch.no_grad()
    def predict(model: LightningDiTTransformer2DModel, case: ParityCase, latent: Tensor) -> Tensor:
        return model(latent, case.tensors["t"], case.tensors["y"]).sample

    @CASES
    def test_widened_layers(self, path: Path) -> None:
        case = load_case(path)
        _, widened = self.widened(case)
        for ours, theirs in (("patch_embed", "x_embedder.proj"), ("proj_out", "final_layer.linear")):
            for kind in ("weight", "bias"):
                expected = case.tensors[f"widened.{theirs}.{kind}"]
                assert torch.equal(widened.get_parameter(f"{ours}.{kind}"), expected)

    @CASES
    def test_widened_output(self, path: Path) -> None:
        case = load_case(path)
        model, widened = self.widened(case)
        z, z_d = case.tensors["base_channels_input"], case.tensors["extra_channels_input"]
        base, detail = self.predict(widened, case, torch.cat([z, z_d], dim=1)).split([z.shape[1], z_d.shape[1]], dim=1)
        assert relative_error(base, self.predict(model, case, z)) < 1e-6
        assert relative_error(base, case.tensors["original_output"]) < TOLERANCE
        assert detail.count_nonzero() == 0

        theirs = case.tensors["widened_output"]
        distance = (theirs[:, : z.shape[1]] - case.tensors["original_output"]).abs().max().item()
        assert distance == pytest.approx(case.info["scalars"]["base_max_abs_diff"], rel=1e-3)
        if case.info["scalars"]["qknorm_added"]:
            # The official routine lets QK-norm in and is no longer the original; ours keeps the attention.
            assert relative_error(base, theirs[:, : z.shape[1]]) > 1e-2
            assert not widened.config.qk_norm
        else:
            assert relative_error(torch.cat([base, detail], dim=1), theirs) < TOLERANCE

    @CASES
    def test_adding_qk_norm_gives_their_output(self, path: Path) -> None:
        case = load_case(path)
        if not case.info["scalars"]["qknorm_added"]:
            pytest.skip("this case adds no QK-norm")
        _, widened = self.widened(case)
        config = {**dict(widened.config), "qk_norm": True}
        normed = LightningDiTTransformer2DModel.from_config(config).eval()
        fresh = {name: p for name, p in normed.state_dict().items() if ".norm_q." in name or ".norm_k." in name}
        assert all(torch.equal(p, torch.ones_like(p)) for p in fresh.values())
        normed.load_state_dict({**widened.state_dict(), **fresh}, strict=True)
        z, z_d = case.tensors["base_channels_input"], case.tensors["extra_channels_input"]
        output = self.predict(normed, case, torch.cat([z, z_d], dim=1))
        assert relative_error(output, case.tensors["widened_output"]) < TOLERANCE
