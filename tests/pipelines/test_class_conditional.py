"""Sampling against a closed form, guidance, noise, labels, and saving."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from tests.end_to_end import children
from tests.pipelines.parts import pipeline_around, small_vae
from torch import Tensor

from davae.diffusion import guide, is_guided, shift_sigmas
from davae.errors import DavaeError
from davae.models.lightningdit import LightningDiTTransformer2DModel
from davae.pipelines.class_conditional import ClassConditionalPipeline
from davae.pipelines.families import family_of


class LinearField(ModelMixin, ConfigMixin):
    """A velocity with a known flow, ``u(x, t) = rate * x + label``, that remembers how it was called."""

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 4, patch_size: int = 1, rate: float = 0.5) -> None:
        super().__init__()
        self.register_to_config(num_classes=3)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.calls: list[tuple[float, int]] = []

    def forward(self, latents: Tensor, timestep: Tensor, class_labels: Tensor) -> Transformer2DModelOutput:
        assert timestep.shape == class_labels.shape == (len(latents),)
        self.calls.append((timestep[0].item(), len(latents)))
        velocity = self.config.rate * latents + class_labels.view(-1, 1, 1, 1)
        return Transformer2DModelOutput(sample=velocity)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_euler_result_equals_the_closed_form() -> None:
    rate, steps, label = 0.5, 5, 2
    pipeline = pipeline_around(LinearField(rate=rate))
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    result = pipeline(label, num_inference_steps=steps, guidance_scale=1.0, latents=noise, output_type="latent")
    # n Euler steps of x' = rate x + c give (x + c / rate) (1 + rate / n)^n - c / rate.
    expected = (noise + label / rate) * (1 + rate / steps) ** steps - label / rate
    torch.testing.assert_close(result.images, expected, rtol=1e-5, atol=1e-5)


def test_time_runs_from_noise_to_data_with_the_scheduler_s_shift() -> None:
    field = LinearField()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / 0.3)
    pipeline_around(field, scheduler=scheduler)(0, num_inference_steps=4, output_type="latent", guidance_scale=1.0)
    times = torch.tensor([time for time, _ in field.calls])
    torch.testing.assert_close(times, shift_sigmas(torch.tensor([0.0, 0.25, 0.5, 0.75]), 0.3), rtol=0, atol=1e-6)


def test_guidance_acts_inside_its_interval_both_bounds_included_in_one_pass() -> None:
    field = LinearField()
    pipeline = pipeline_around(field)
    pipeline([0, 1], num_inference_steps=10, guidance_interval=(0.2, 0.7), output_type="latent")
    assert [size for _, size in field.calls] == [2, 2, 4, 4, 4, 4, 4, 4, 2, 2]  # t = 0, 0.1, ..., 0.9


def test_guided_euler_step_by_hand() -> None:
    pipeline = pipeline_around(LinearField(rate=0.0))  # the velocity is the label; the null label is 3
    noise = torch.zeros(1, 4, 4, 4)
    arguments = {"num_inference_steps": 1, "guidance_scale": 4.0, "latents": noise, "output_type": "latent"}
    image = pipeline(1, **arguments).images
    assert torch.equal(image, torch.full_like(noise, 3 + 4.0 * (1 - 3)))
    image = pipeline(1, guidance_channels=3, **arguments).images
    assert image[0, :, 0, 0].tolist() == [-5.0, -5.0, -5.0, 1.0]


def test_guide_keeps_the_conditional_prediction_outside_its_channels() -> None:
    conditional, unconditional = torch.full((1, 2, 1, 1), 2.0), torch.zeros(1, 2, 1, 1)
    assert guide(conditional, unconditional, 3.0).flatten().tolist() == [6.0, 6.0]
    assert guide(conditional, unconditional, 3.0, channels=1).flatten().tolist() == [6.0, 2.0]


@pytest.mark.parametrize(("t", "inside"), [(0.19, False), (0.2, True), (1 - 0.8, True), (0.5, True), (0.51, False)])
def test_interval(t: float, inside: bool) -> None:
    assert is_guided(float(torch.tensor(t)), (0.2, 0.5)) is inside


class Layout:
    base_channels, detail_channels = 4, 6


class UpgradedVae(AutoencoderKL):
    """Stands for the upgraded autoencoder: twice the image on the same grid, and a layout."""

    layout = Layout()


def upgraded_vae() -> UpgradedVae:
    return UpgradedVae(
        block_out_channels=(4, 4, 4),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=10,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


@pytest.mark.parametrize("generators", [lambda: seeded(7), lambda: [seeded(1), seeded(2)]], ids=["one", "each"])
def test_upgraded_pipeline_starts_from_the_base_s_noise(generators: Any) -> None:
    still = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
    field = {"rate": 0.0}
    base = pipeline_around(LinearField(**field))([0, 0], generator=generators(), **still).images
    upgraded = pipeline_around(LinearField(in_channels=10, **field), vae=upgraded_vae())
    wide = upgraded([0, 0], generator=generators(), **still).images
    assert wide.shape == (2, 10, 4, 4)
    assert torch.equal(wide[:, :4], base)
    assert abs(wide[:, 4:].std() - 1) < 0.2  # details have noise of their own
    assert not torch.equal(wide[:, 4:8], base)


def test_image_size_follows_the_vae_and_output_types_agree() -> None:
    vae = small_vae()
    pipeline = pipeline_around(LinearField(), vae=vae)
    call = {"num_inference_steps": 2, "class_labels": [0, "meadow"]}
    latent = pipeline(**call, generator=seeded(), output_type="latent").images
    tensor = pipeline(**call, generator=seeded(), output_type="pt").images
    assert tensor.shape == (2, 3, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latent / 0.5 + 0.25).sample / 2 + 0.5
    torch.testing.assert_close(tensor, expected.clamp(0, 1))
    array = pipeline(**call, generator=seeded(), output_type="np", return_dict=False)[0]
    assert (array == tensor.permute(0, 2, 3, 1).numpy()).all()
    assert [image.size for image in pipeline(**call, height=12, width=16).images] == [(16, 12)] * 2


def test_callback_may_change_the_latents() -> None:
    def reset(pipeline: Any, step: int, timestep: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": torch.full_like(values["latents"], float(step))}

    pipeline = pipeline_around(LinearField())
    images = pipeline(0, num_inference_steps=3, output_type="latent", callback_on_step_end=reset).images
    assert (images == 2).all()


def test_names_and_numbers_mean_the_same_class() -> None:
    pipeline = pipeline_around(LinearField())
    call = {"num_inference_steps": 2, "output_type": "latent"}
    by_number = pipeline([2, 0], generator=seeded(), **call).images
    by_name = pipeline(["lake", "brick wall"], generator=seeded(), **call).images
    assert torch.equal(by_number, by_name)
    assert pipeline.labels == {"brick wall": 0, "meadow": 1, "Lake": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "medow"}, "class 'medow' is unknown; the nearest names are meadow"),
        (
            {"class_labels": [0, 4]},
            "class label 4 is out of range: the model knows 0 to 2, and 3 for no class",
        ),
        ({"class_labels": []}, "class_labels is empty"),
        ({"height": 9}, "height 9 is not a multiple of 2 pixels; the nearest is 8"),
        ({"width": 0}, "width 0 is not a multiple"),
        ({"output_type": "png"}, "output_type 'png' is unknown: choose one of pil, np, pt, latent"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"timestep_shift": 0.0}, "timestep_shift is 0.0: it must be above 0"),
        ({"latents": torch.zeros(1, 5, 4, 4)}, r"latents have shape \(1, 5, 4, 4\), expected \(1, 4, 4, 4\)"),
        ({"generator": [seeded(), seeded()]}, "2 generators for 1 labels"),
    ],
)
def test_mistakes_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        pipeline_around(LinearField())(**{"class_labels": 0, **arguments})


def test_name_without_names_and_channels_that_differ() -> None:
    with pytest.raises(DavaeError, match="has no class names, so 'lake' must be given by number"):
        pipeline_around(LinearField(), id2label=None)("lake")
    with pytest.raises(DavaeError, match=r"VAE's latent has 8 channels, the transformer takes 4"):
        pipeline_around(LinearField(), vae=small_vae(8))


def test_saved_pipeline_loads_in_a_new_process_and_makes_the_same_image(tmp_path: Path) -> None:
    torch.manual_seed(0)
    transformer = LightningDiTTransformer2DModel(
        sample_size=4,
        patch_size=1,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_classes=3,
    ).eval()
    torch.nn.init.normal_(transformer.proj_out.weight)
    pipeline = pipeline_around(transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0))
    pipeline.save_pretrained(tmp_path / "pipeline")
    image = pipeline("lake", num_inference_steps=2, generator=seeded(), output_type="pt").images
    torch.save(image, tmp_path / "image.pt")

    loaded = ClassConditionalPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.labels == pipeline.labels
    assert loaded.scheduler.config.shift == 2.0
    assert torch.equal(loaded("lake", num_inference_steps=2, generator=seeded(), output_type="pt").images, image)

    log = tmp_path / "log"
    children.finish(children.start(_open_and_compare, tmp_path, log=log), log)


def _open_and_compare(folder: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(folder / "pipeline")
    made = pipeline("lake", num_inference_steps=2, generator=seeded(), output_type="pt").images
    assert torch.equal(made, torch.load(folder / "image.pt"))


FLOW_SOLVER = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


@pytest.mark.parametrize(
    ("scheduler", "order"),
    [
        (FlowMatchEulerDiscreteScheduler(), 1),
        (FlowMatchHeunDiscreteScheduler(), 2),
        (DPMSolverMultistepScheduler(**FLOW_SOLVER), 2),
        (UniPCMultistepScheduler(**FLOW_SOLVER), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_flow_scheduler_nears_the_exact_flow(scheduler: Any, order: int) -> None:
    rate, label = 0.9, 2
    noise = torch.randn(1, 4, 4, 4, generator=seeded())
    exact = (noise + label / rate) * math.exp(rate) - label / rate  # of x' = rate x + label, from t = 0 to 1

    def error(steps: int) -> float:
        call = {"num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
        made = pipeline_around(LinearField(rate=rate), scheduler=scheduler)(label, latents=noise, **call)
        return float((made.images - exact).abs().max() / exact.abs().max())

    coarse, fine = error(6), error(24)
    assert fine < 0.06 if order == 1 else fine < 0.006
    assert fine < coarse / (3 if order == 1 else 6)


def test_heun_asks_twice_a_step_at_the_times_of_its_corrector() -> None:
    field = LinearField()
    pipeline = pipeline_around(field, scheduler=FlowMatchHeunDiscreteScheduler())
    pipeline(0, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    times = [round(time, 3) for time, _ in field.calls]
    assert len(times) == 5
    assert times[1] == times[2]
    assert times[3] == times[4] == 0.999


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        FlowMatchHeunDiscreteScheduler(),
        UniPCMultistepScheduler(**FLOW_SOLVER),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_timestep_shift_of_a_call_equals_the_scheduler_s_own(scheduler: Any) -> None:
    call = {"num_inference_steps": 4, "output_type": "latent", "guidance_scale": 1.0}
    before = dict(scheduler.config)
    asked = pipeline_around(LinearField(), scheduler=scheduler)
    name = "shift" if "shift" in scheduler.config else "flow_shift"
    own = pipeline_around(LinearField(), scheduler=type(scheduler).from_config(before, **{name: 1 / 0.3}))
    shifted = asked(1, generator=seeded(), timestep_shift=0.3, **call).images
    assert torch.equal(shifted, own(1, generator=seeded(), **call).images)
    assert not torch.equal(shifted, asked(1, generator=seeded(), **call).images)
    assert dict(asked.scheduler.config) == before


def test_the_official_count_of_250_points_is_249_steps() -> None:
    field = LinearField()
    call = {"num_inference_steps": 249, "timestep_shift": 0.3, "guidance_scale": 1.0, "output_type": "latent"}
    pipeline_around(field)(0, **call)
    official = shift_sigmas(torch.linspace(0, 1, 250, dtype=torch.float64), 0.3)[:-1]
    times = torch.tensor([time for time, _ in field.calls], dtype=torch.float64)
    torch.testing.assert_close(times, official, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (DDIMScheduler(), "DDIMScheduler is not set up for flow matching: take FlowMatchEuler"),
        (UniPCMultistepScheduler(), "UniPCMultistepScheduler is not set up for flow matching"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "set use_dynamic_shifting=False"),
    ],
)
def test_a_scheduler_of_another_kind_is_refused(scheduler: Any, message: str) -> None:
    with pytest.raises(DavaeError, match=message):
        pipeline_around(LinearField(), scheduler=scheduler)(0)


def test_statistics_of_each_channel_are_undone_before_decoding_and_applied_after_encoding() -> None:
    vae = small_vae()
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 0.5, 1.0, 4.0]
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
    pipeline = pipeline_around(LinearField(rate=0.0), vae=vae)
    latent = torch.randn(1, 4, 4, 4, generator=seeded())
    call = {"num_inference_steps": 1, "guidance_scale": 1.0, "latents": latent}
    made = pipeline(0, output_type="pt", **call).images * 2 - 1
    mean_, std_ = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    with torch.no_grad():
        expected = vae.decode(latent * std_ + mean_).sample.clamp(-1, 1)
        raw = vae.encode(expected).latent_dist.mode()
    torch.testing.assert_close(made, expected)
    seen = family_of(pipeline).latents_of(vae, expected)
    torch.testing.assert_close(seen, (raw - mean_) / std_)
