"""Upgraded pipelines run as their base does: in its precision, on its device, and while they are offloaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import DiffusionPipeline
from tests.pipelines.parts import upgraded
from tests.pipelines.test_upgrade_image_to_image import IMAGE, INPAINT, call
from tests.pipelines.upgrades import DETAILS, autoencoder, base_and_upgraded, noises

import davae
from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments, small_pipeline
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import Previews, attach_lora, speed_up, upgrade_pipeline

OTHER = torch.device("meta")  # plays the device that this machine lacks


def image(pipe: DiffusionPipeline, name: str, **further: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(**call_arguments(name, scale=2), generator=generator, **further).images)


# ---------------------------------------------------------------------- precision and device


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_a_half_precision_pipeline_takes_an_autoencoder_of_any_precision(name: str) -> None:
    vae = autoencoder(name)  # float32, as from_pretrained loads it
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    base = small_pipeline(name).to(torch.bfloat16)
    base_vae = {key: value.clone() for key, value in base.vae.state_dict().items()}
    pipe = upgrade_pipeline(base, vae)
    assert pipe.vae.dtype == pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae is not vae
    for given, kept in ((vae, before), (base.vae, base_vae)):
        for key, value in given.state_dict().items():
            assert value.dtype == kept[key].dtype, key
            assert torch.equal(value, kept[key]), key
    assert image(pipe, name).isfinite().all()


def test_an_autoencoder_that_fits_is_itself_part_of_the_pipeline() -> None:
    base = small_pipeline("sd3")
    assert upgrade_pipeline(base, autoencoder("sd3")).vae is autoencoder("sd3")
    base.vae.to(torch.float64)  # a VAE more precise than its pipeline, as some choose
    pipe = upgrade_pipeline(base, autoencoder("sd3"))
    assert (pipe.vae.dtype, pipe.transformer.dtype) == (torch.float64, torch.float32)
    base.vae.to(torch.float32)
    mixed = copy.deepcopy(autoencoder("sd3"))
    mixed.joint_decoder.to(torch.bfloat16)  # the first parameters alone do not tell
    pipe = upgrade_pipeline(base, mixed)
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}


def test_the_autoencoder_follows_the_base_to_its_device() -> None:
    from davae.pipelines import upgrade

    base, vae = small_pipeline("sd3").vae.to(OTHER, torch.float16), autoencoder("sd3")
    placed = upgrade._placed_as(base, vae)
    assert {(p.device, p.dtype) for p in placed.parameters()} == {(OTHER, torch.float16)}
    assert {(p.device.type, p.dtype) for p in vae.parameters()} == {("cpu", torch.float32)}


def test_a_copy_of_a_faster_autoencoder_decodes_with_its_own_weights() -> None:
    base, pipe = base_and_upgraded("sd3")
    vae = copy.deepcopy(pipe.vae)
    pipe.vae = vae
    speed_up(pipe, decode_dtype="bfloat16")
    base.to(torch.float64)
    again = upgrade_pipeline(base, vae).vae
    latent = torch.linspace(-1, 1, 12 * 16).view(1, 12, 4, 4)
    with torch.no_grad():
        before = vae.decode(latent).sample
        again.joint_decoder.conv_out.weight.zero_()
        again.joint_decoder.conv_out.bias.zero_()
        assert not again.decode(latent.double()).sample.any()
        assert torch.equal(vae.decode(latent).sample, before)


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])
def test_adapters_on_the_same_base_in_another_precision(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = upgraded(small_pipeline(name))
    torch.manual_seed(1)
    attach_lora(pipe.transformer, LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    davae.save_adapters(pipe, tmp_path)
    pipe.vae.save_pretrained(tmp_path / "autoencoder")
    expected = image(pipe, name)
    base = small_pipeline(name).to(torch.bfloat16)
    again = davae.load_adapters(base, tmp_path / "autoencoder", tmp_path)
    assert again.vae.dtype == torch.bfloat16
    assert (image(again, name).float() - expected).abs().mean() < 0.05
    assert davae.load_adapters(base, pipe.vae, tmp_path).vae.dtype == torch.bfloat16
    assert pipe.vae.dtype == torch.float32


# ---------------------------------------------------------------------- offloading


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_sequential_offloading(name: str) -> None:
    """Of the autoencoder: accelerate does not offload the other parts from the CPU to the CPU."""
    _, pipe = base_and_upgraded(name)
    expected = image(pipe, name)
    pipe.vae = copy.deepcopy(pipe.vae)
    cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in pipe.vae.parameters())
    further: dict[str, Any] = {}
    if name == "pixart-sigma":
        further = {"callback": Previews(pipe, output_type="pt").on_step}
    elif name != "dit":
        further = {"callback_on_step_end": Previews(pipe, output_type="pt")}
    torch.testing.assert_close(image(pipe, name, **further), expected)


def test_previews_while_models_are_offloaded() -> None:
    """The weights wait on the CPU until the VAE is called; latents stay on the device where it then computes."""
    _, pipe = base_and_upgraded("sd3")
    latents = noises("sd3", pipe)[1].to(OTHER)
    pipe.vae, _ = cpu_offload_with_hook(copy.deepcopy(pipe.vae), OTHER)
    seen: list[torch.device] = []
    pipe.vae.base.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].device))
    shown = Previews(pipe, output_type="pt").decode(latents)
    assert seen == [OTHER]
    assert shown.shape == (1, 3, 32, 32)


def test_previews_bring_latents_to_a_preview_decoder() -> None:
    _, pipe = base_and_upgraded("sd3")
    decoder = copy.deepcopy(pipe.vae.base_vae).to(torch.float64)
    davae.pipelines.set_preview_decoder(pipe, decoder)
    assert Previews(pipe, output_type="pt").decode(noises("sd3", pipe)[1]).dtype == torch.float64


def test_offloaded_models_are_not_upgraded() -> None:
    for kind in ("sequential", "model", "group"):
        base = small_pipeline("sd3")
        if kind == "sequential":
            base.enable_sequential_cpu_offload(device="cpu")
        elif kind == "model":
            base.enable_model_cpu_offload(device="cpu")
        else:
            cpu = torch.device("cpu")
            base.transformer.enable_group_offload(cpu, cpu, "leaf_level")
        with pytest.raises(DavaeError, match="upgrade the pipeline first, then switch offloading on"):
            upgrade_pipeline(base, autoencoder("sd3"))
    vae = copy.deepcopy(autoencoder("sd3"))
    cpu_offload(vae, execution_device=torch.device("cpu"))
    with pytest.raises(DavaeError, match="offloading is switched on"):
        upgrade_pipeline(small_pipeline("sd3"), vae)


@pytest.mark.parametrize(("name", "cls"), [*IMAGE, *INPAINT])
def test_given_images_in_half_precision_and_offloaded(name: str, cls: type[DiffusionPipeline]) -> None:
    base = cls.from_pipe(small_pipeline(name)).to(torch.bfloat16)
    base.set_progress_bar_config(disable=True)
    pipe = upgrade_pipeline(base, autoencoder(name))
    mask = {"mask_image": torch.ones(1, 1, 64, 64)} if (name, cls) in INPAINT else {}
    made = call(pipe, 64, **mask)
    assert made.isfinite().all()
    cpu_offload(pipe.vae, execution_device=torch.device("cpu"))
    assert torch.equal(call(pipe, 64, **mask), made)


# ---------------------------------------------------------------------- Lumina 2's division


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_silent_details_do_not_divide_by_zero(dtype: torch.dtype) -> None:
    pipe = upgrade_pipeline(small_pipeline("lumina2").to(dtype), autoencoder("lumina2"))
    latents = pipe(**call_arguments("lumina2", scale=2) | {"output_type": "latent"}).images
    assert latents.isfinite().all()
    silent = torch.zeros(1, 4 + DETAILS, 1, 1, dtype=dtype)
    with torch.no_grad():
        (hook,) = pipe.transformer._forward_hooks.values()
        hook(pipe.transformer, (), (silent,))
    assert not silent[:, :4].any()
    assert (silent[:, 4:].norm(dim=-1) > 0).all()
    assert (silent[:, 4:].square() > 0).all()
    assert silent.max() < 1e-3
    spoken = torch.full_like(silent, 0.3)
    with torch.no_grad():
        hook(pipe.transformer, (), (spoken,))
    assert torch.equal(spoken, torch.full_like(silent, 0.3)), "a tuned prediction stays as it is"


def test_the_scheduler_is_read_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    from davae.diffusion import set_sigmas

    def absent(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError("float64")

    monkeypatch.setattr(torch.Tensor, "double", absent)
    sigmas = set_sigmas(FlowMatchEulerDiscreteScheduler(), 4, torch.device("cpu"))
    assert sigmas == pytest.approx([1, 0.75, 0.5, 0.25])


def test_autoencoders_of_other_bases_are_still_refused_in_half_precision() -> None:
    base = small_pipeline("sd3").to(torch.bfloat16)
    other = AutoencoderDA.from_base(small_pipeline("sd3", seed=1).vae, detail_channels=DETAILS)
    with pytest.raises(DavaeError, match="made from another base VAE"):
        upgrade_pipeline(base, other)
