"""The transformer, guidance and sampling against the authors' own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from davae.diffusion import shift_sigmas
from davae.interop.official_lightningdit import convert
from davae.models.lightningdit import LightningDiTTransformer2DModel
from davae.pipelines.class_conditional import guided_velocity
from tests.conftest import ParityCase, load_case, parity_cases, relative_error
from tests.pipelines.parts import pipeline_around

TOLERANCE = 1e-5
CASES = pytest.mark.parametrize("path", parity_cases("lightningdit", having="model"))


def load(path: Path) -> tuple[ParityCase, LightningDiTTransformer2DModel]:
    case = load_case(path)
    config, state_dict = convert(case.state_dict())
    model = LightningDiTTransformer2DModel(**config).eval()
    model.load_state_dict(state_dict, strict=True)
    return case, model


@CASES
def test_configuration_is_read_off_the_weights(path: Path) -> None:
    case, model = load(path)
    stated = case.info["config"]["model"]
    names = {
        "input_size": "sample_size",
        "depth": "num_layers",
        "num_heads": "num_attention_heads",
        "use_qknorm": "qk_norm",
        "use_swiglu": "swiglu",
        "use_rope": "rope",
        "use_rmsnorm": "rms_norm",
    }
    for name, value in stated.items():
        if name == "wo_shift":
            assert model.config.adaln_shift is not value
        else:
            assert model.config[names.get(name, name)] == value, name


@CASES
@torch.no_grad()
def test_forward(path: Path) -> None:
    case, model = load(path)
    data = case.tensors
    blocks: list[Tensor] = []
    for block in model.transformer_blocks:
        block.register_forward_hook(lambda _module, _inputs, output: blocks.append(output))
    assert relative_error(model.embed_time(data["t"]), data["t_embedding"]) < TOLERANCE
    assert relative_error(model.embed_tokens(data["x"]), data["token_embedding"]) < TOLERANCE
    assert relative_error(model(data["x"], data["t"], data["y"]).sample, data["output"]) < TOLERANCE
    assert relative_error(torch.stack(blocks), data["block_outputs"]) < TOLERANCE
    null = torch.full_like(data["y"], model.null_label)
    assert relative_error(model(data["x"], data["t"], null).sample, data["output_null_label"]) < TOLERANCE


@CASES
@torch.no_grad()
def test_guidance(path: Path) -> None:
    case, model = load(path)
    data, guidance = case.tensors, case.info["config"]["guidance"]
    latents, labels = data["cfg_x"].chunk(2)[0], data["cfg_y"].chunk(2)[0]
    expected = [name for name in data if name.startswith("cfg_") and name.endswith(("channels", "first3"))]
    assert len(expected) >= 7
    for name in expected:
        where = name.removeprefix("cfg_").split("_")[0]  # below, equal, above; or no interval
        times = data.get(f"cfg_{where}_t", data["cfg_below_t"])
        velocity = guided_velocity(
            model,
            latents,
            1 - times[0].item(),
            labels,
            guidance_scale=guidance["cfg_scale"],
            guidance_interval=(0.0 if where == "no" else guidance["cfg_interval_start"], 1.0),
            guidance_channels=3 if name.endswith("first3") else None,
        )
        # The official code answers for both halves; its sampler keeps the first.
        assert relative_error(-velocity, data[name].chunk(2)[0]) < TOLERANCE, name


@CASES
def test_sampling(path: Path) -> None:
    case, model = load(path)
    data, sampler = case.tensors, case.info["config"]["sampler"]
    guidance = case.info["config"]["guidance"]
    uniform = torch.linspace(0, 1, sampler["num_steps"])
    assert relative_error(shift_sigmas(uniform, sampler["timestep_shift"]), data["sample_times"]) < TOLERANCE

    def sample(*, shift: float, scale: float) -> list[Tensor]:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / shift)
        trajectory = [data["sample_noise"]]
        pipeline = pipeline_around(model, scheduler=scheduler)
        pipeline(
            data["y"],
            num_inference_steps=sampler["num_steps"] - 1,  # the official count is of points
            guidance_scale=scale,
            guidance_interval=(guidance["cfg_interval_start"], 1.0),
            latents=data["sample_noise"],
            output_type="latent",
            callback_on_step_end=lambda _p, _i, _t, values: trajectory.append(values["latents"]),
        )
        return trajectory

    shift = sampler["timestep_shift"]
    assert relative_error(torch.stack(sample(shift=shift, scale=1.0)), data["sample_trajectory"]) < TOLERANCE
    guided = sample(shift=shift, scale=guidance["cfg_scale"])[-1]
    assert relative_error(guided, data["sample_cfg_final"]) < TOLERANCE
    assert relative_error(sample(shift=1.0, scale=1.0)[-1], data["sample_final_no_shift"]) < TOLERANCE


@pytest.mark.parametrize("path", parity_cases("lightningdit"))
@torch.no_grad()
def test_every_official_state_dict_loads(path: Path) -> None:
    case, model = load(path)
    if "original_output" in case.tensors:
        data = case.tensors
        output = model(data["base_channels_input"], data["t"], data["y"]).sample
        assert relative_error(output, data["original_output"]) < TOLERANCE
