"""The schedule of an upgraded pipeline: the base's at the same tokens by default, the choice in the configuration."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tests.pipelines.upgrades import autoencoder, base_and_upgraded
from torch import Tensor

from davae.bases.debug_pipelines import base_resolution, call_arguments, small_pipeline
from davae.errors import DavaeError
from davae.pipelines import upgrade_pipeline

FLOW = ("sd3", "flux", "sana", "qwenimage", "lumina2", "auraflow")
DYNAMIC = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.16}


def sigmas(pipe: DiffusionPipeline, name: str, scale: int, steps: int = 4, **further: object) -> Tensor:
    pipe(**(call_arguments(name, scale=scale) | {"num_inference_steps": steps} | further))
    return pipe.scheduler.sigmas.clone()


def dynamic(name: str) -> DiffusionPipeline:
    """The small pipeline with a shift that follows the tokens, also where the family's is fixed."""
    pipe = small_pipeline(name)
    if not pipe.scheduler.config.use_dynamic_shifting:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, **DYNAMIC)
    return pipe


def shifted(mu: float, steps: int = 4) -> Tensor:
    """Equation of the exponential shift on a uniform grid from 1, with the end."""
    grid = torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64)
    moved = math.exp(mu) / (math.exp(mu) + 1 / grid - 1)
    return torch.cat([moved, torch.zeros(1)]).float()


@pytest.mark.parametrize("name", FLOW)
def test_by_default_the_schedule_is_the_base_s_at_its_tokens(name: str) -> None:
    base, upgraded = base_and_upgraded(name)
    assert torch.equal(sigmas(upgraded, name, 2), sigmas(base, name, 1))


@pytest.mark.parametrize("name", ["sd3", "flux", "qwenimage", "lumina2"])
def test_default_with_dynamic_shifting_is_written_down(name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = dynamic(name)
    with caplog.at_level(logging.INFO, "davae.pipelines.upgrade"):
        upgraded = upgrade_pipeline(base, autoencoder(name))
    torch.testing.assert_close(sigmas(upgraded, name, 2), sigmas(base, name, 1), atol=1e-6, rtol=0)
    assert "timestep shift 'base': follows the number of tokens: base_image_seq_len" in caplog.text
    ours, theirs = upgraded.scheduler.config, base.scheduler.config
    if name == "lumina2":  # its pipeline counts channels where it means tokens: 12 now, 4 before
        assert (ours.base_image_seq_len, ours.max_image_seq_len) == (3 * 256, 3 * 4096)
    else:
        assert all(ours[key] == theirs[key] for key in ("base_image_seq_len", "max_image_seq_len", "max_shift"))


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_native_is_the_shift_of_the_full_resolution(name: str, scale: int) -> None:
    """What the base model uses for s^2 times the tokens."""
    base = dynamic(name)
    upgraded = upgrade_pipeline(base, autoencoder(name, scale), timestep_shift="native")
    config = upgraded.scheduler.config
    assert config.base_image_seq_len == 256 / scale**2
    assert config.max_image_seq_len == 4096 / scale**2
    found = sigmas(upgraded, name, scale)
    native = sigmas(base, name, scale)  # the base, asked for the full resolution
    torch.testing.assert_close(found, native, atol=1e-6, rtol=0)
    tokens = (scale * base_resolution(name) // base.vae_scale_factor // 2) ** 2
    line = base.scheduler.config
    mu = line.base_shift + (line.max_shift - line.base_shift) * (tokens - 256) / (4096 - 256)
    if name == "flux":
        torch.testing.assert_close(found, shifted(mu), atol=1e-6, rtol=0)
    assert not torch.allclose(found, sigmas(base, name, 1), atol=1e-4)


def test_published_numbers_of_flux() -> None:
    """1024 pixels: 4096 tokens give mu 1.15, the 1024 tokens of an upgraded model 0.63."""
    base, upgraded = base_and_upgraded("flux")
    _, native = base_and_upgraded("flux", timestep_shift="native")
    for pipe, mu in ((upgraded, 0.63), (native, 1.15)):
        line = pipe.scheduler.config
        slope = (line.max_shift - line.base_shift) / (line.max_image_seq_len - line.base_image_seq_len)
        assert line.base_shift + slope * (1024 - line.base_image_seq_len) == pytest.approx(mu, abs=1e-3)
    assert base.scheduler.config.max_image_seq_len == 4096


@pytest.mark.parametrize("name", ["sd3", "flux", "auraflow", "lumina2"])
def test_a_number_is_the_shift_for_every_size(name: str) -> None:
    for base in (small_pipeline(name), dynamic(name) if name != "auraflow" else small_pipeline(name)):
        upgraded = upgrade_pipeline(base, autoencoder(name), timestep_shift=2.5)
        assert upgraded.scheduler.config.shift == 2.5
        assert not upgraded.scheduler.config.use_dynamic_shifting
        found = sigmas(upgraded, name, 2)
        if name in ("flux", "lumina2"):  # the others' grid ends elsewhere
            torch.testing.assert_close(found, shifted(math.log(2.5)), atol=1e-6, rtol=0)
        assert torch.equal(found, sigmas(upgraded, name, 4))


def test_a_number_for_a_multistep_solver() -> None:
    base = small_pipeline("sana")
    upgraded = upgrade_pipeline(base, autoencoder("sana"), timestep_shift=1.5)
    assert isinstance(upgraded.scheduler, DPMSolverMultistepScheduler)
    assert upgraded.scheduler.config.flow_shift == 1.5
    assert base.scheduler.config.flow_shift == 3.0
    assert not torch.equal(sigmas(upgraded, "sana", 2), sigmas(base, "sana", 1))


@pytest.mark.parametrize(
    ("name", "shift", "message"),
    [
        ("flux", "double", "must be 'base', 'native' or a number, not 'double'"),
        ("flux", True, "must be 'base', 'native' or a number, not True"),
        ("flux", -1.0, "must be a positive number, not -1.0"),
        ("flux", float("nan"), "must be a positive number, not nan"),
        ("dit", 3.0, "DDIMScheduler has no timestep shift"),
        ("pixart-sigma", 3.0, "DPMSolverMultistepScheduler has no timestep shift"),
    ],
)
def test_what_cannot_be(name: str, shift: object, message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        upgrade_pipeline(small_pipeline(name), autoencoder(name), timestep_shift=shift)


def test_pipelines_with_their_own_rule_say_so() -> None:
    base = small_pipeline("flux")
    base.__class__ = type("Flux2Pipeline", (type(base),), {})
    line = dict(base.scheduler.config)
    assert upgrade_pipeline(base, autoencoder("flux")).scheduler.config == line  # by tokens: nothing to write
    with pytest.raises(DavaeError, match="'native' cannot be written into the scheduler: Flux2Pipeline has"):
        upgrade_pipeline(base, autoencoder("flux"), timestep_shift="native")
    assert upgrade_pipeline(base, autoencoder("flux"), timestep_shift=2.0).scheduler.config.shift == 2.0
    base.__class__ = type("Ideogram4Pipeline", (type(small_pipeline("flux")),), {})
    with pytest.raises(DavaeError, match=r"'base' cannot be written into the scheduler: .* in pixels"):
        upgrade_pipeline(base, autoencoder("flux"))


def test_a_prefix_of_a_class_name_decides_nothing() -> None:
    base = small_pipeline("flux")
    base.__class__ = type("Flux2AlikePipeline", (type(base),), {})
    upgraded = upgrade_pipeline(base, autoencoder("flux"), timestep_shift="native")
    assert upgraded.scheduler.config.max_image_seq_len == 1024
