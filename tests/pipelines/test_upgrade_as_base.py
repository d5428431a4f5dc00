"""What diffusers' pipelines and peft do with a base they do with the upgraded one, or it is refused by name."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    SanaControlNetModel,
    SanaControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
)
from diffusers.models.controlnets.controlnet_z_image import ZImageControlNetModel
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file
from tests.pipelines.parts import ideogram4, upgraded
from tests.pipelines.test_upgrade_image_to_image import IMAGE, INPAINT, call
from tests.pipelines.upgrades import DETAILS, autoencoder, base_and_upgraded
from tests.warm_start.models import randomise
from torch import Tensor, nn

import davae
from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments, small_pipeline
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import AutoencoderDA
from davae.pipelines import attach_lora, attached_lora, fit_to_autoencoder, load_pipeline, merge_lora, upgrade_pipeline
from davae.pipelines.families.class_fixes import padded_lora, unguarded
from davae.pipelines.saving.adapters import lora_metadata
from davae.warm_start import WarmStartError, description_of, dummy_arguments, widen_channels
from davae.warm_start.patterns import split_axis
from davae.warm_start.plain_state import unwrapped

LAYOUT = LatentLayout(4, DETAILS)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def image(pipe: DiffusionPipeline, name: str, **further: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(**call_arguments(name, scale=2) | further, generator=generator()).images)


# ---------------------------------------------------------------------- other pipelines over the same parts


@pytest.mark.parametrize(("name", "cls"), [*IMAGE, *INPAINT])
def test_from_pipe_as_documented(name: str, cls: type[DiffusionPipeline]) -> None:
    _, base = base_and_upgraded(name)
    pipe = fit_to_autoencoder(cls.from_pipe(base, vae=base.vae, dtype=base.dtype))
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.vae, pipe.transformer) == (base.vae, base.transformer)
    mask = {"mask_image": torch.ones(1, 1, 64, 64)} if (name, cls) in INPAINT else {}
    expected = cls.from_pipe(small_pipeline(name))
    expected.set_progress_bar_config(disable=True)
    assert torch.equal(call(pipe, 64, **mask), call(upgrade_pipeline(expected, autoencoder(name)), 64, **mask))


@pytest.mark.parametrize("name", ["pixart-sigma", "sana", "lumina2", "auraflow"])
def test_from_pipe_of_its_own_class_keeps_sizes_and_precision(name: str) -> None:
    base = upgrade_pipeline(small_pipeline(name).to(torch.bfloat16), autoencoder(name))
    pipe = fit_to_autoencoder(type(base).from_pipe(base, vae=base.vae, dtype=base.dtype))
    assert {pipe.vae.dtype, pipe.transformer.dtype} == {torch.bfloat16}
    assert torch.equal(image(pipe, name), image(base, name))


@pytest.mark.parametrize("name", ["sd3", "flux", "qwenimage"])
def test_auto_pipelines_go_from_task_to_task(name: str) -> None:
    _, base = base_and_upgraded(name)
    expected = image(base, name)
    pipe = AutoPipelineForImage2Image.from_pipe(base)
    assert call(pipe, 64).isfinite().all()
    pipe = fit_to_autoencoder(AutoPipelineForInpainting.from_pipe(pipe))
    assert call(pipe, 64, mask_image=torch.ones(1, 1, 64, 64)).isfinite().all()
    assert torch.equal(image(AutoPipelineForText2Image.from_pipe(pipe), name), expected)


# ---------------------------------------------------------------------- a VAE more precise than its pipeline


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_a_float32_vae_in_a_bfloat16_pipeline(name: str) -> None:
    pipe = upgrade_pipeline(small_pipeline(name).to(torch.bfloat16), autoencoder(name))
    pipe.vae.to(torch.float32)
    assert image(pipe, name).isfinite().all()


@pytest.mark.parametrize(("name", "cls"), [*IMAGE, *INPAINT])
def test_a_float32_vae_that_encodes_for_a_bfloat16_pipeline(name: str, cls: type[DiffusionPipeline]) -> None:
    base = cls.from_pipe(small_pipeline(name)).to(torch.bfloat16)
    base.set_progress_bar_config(disable=True)
    pipe = upgrade_pipeline(base, autoencoder(name))
    pipe.vae.to(torch.float32)
    mask = {"mask_image": torch.ones(1, 1, 64, 64)} if (name, cls) in INPAINT else {}
    assert call(pipe, 64, **mask).isfinite().all()


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_an_autoencoder_computes_in_its_own_precision(own: torch.dtype, given: torch.dtype) -> None:
    vae = copy.deepcopy(autoencoder("sd3")).to(own)
    images = torch.rand(1, 3, 32, 32, generator=generator()).to(given)
    with torch.no_grad():
        latent = vae.encode(images).latent_dist.mode()
        expected = vae.encode(images.to(own)).latent_dist.mode()
        assert latent.dtype == (torch.bfloat16 if torch.bfloat16 in (own, given) else torch.float32)
        assert torch.equal(latent, expected.to(latent.dtype))
        assert torch.equal(vae.decode(latent.to(given)).sample, vae.decode(latent.to(given).to(own)).sample)


# ---------------------------------------------------------------------- parts that read latents

CONTROLS: dict[str, tuple[type[ModelMixin], type[DiffusionPipeline]]] = {
    "sd3": (SD3ControlNetModel, StableDiffusion3ControlNetPipeline),
    "flux": (FluxControlNetModel, FluxControlNetPipeline),
    "qwenimage": (QwenImageControlNetModel, QwenImageControlNetPipeline),
    "sana": (SanaControlNetModel, SanaControlNetPipeline),
}
MASKED = {"sd3": {"extra_conditioning_channels": 1}, "qwenimage": {"extra_condition_channels": 4}}


def controlnet(name: str, **further: Any) -> Any:
    cls, _ = CONTROLS[name]
    known = inspect.signature(cls).parameters
    config = {key: value for key, value in small_pipeline(name).transformer.config.items() if key in known}
    return randomise(cls(**config | further))


def controlled(name: str, nets: Any) -> DiffusionPipeline:
    _, cls = CONTROLS[name]
    parts = {key: value for key, value in small_pipeline(name).components.items() if value is not None}
    return cls(**parts, controlnet=nets)


@pytest.mark.parametrize(
    ("name", "masked"), [*((name, False) for name in CONTROLS), ("sd3", True), ("qwenimage", True)]
)
def test_a_widened_controlnet_gives_the_residuals_it_gave(name: str, masked: bool) -> None:
    net = controlnet(name, **(MASKED[name] if masked else {}))
    wide = widen_channels(net, base_channels=4, detail_channels=DETAILS)
    latent = torch.randn(1, 4 + DETAILS, 4, 4, generator=generator())
    with torch.no_grad():
        before, after = (
            model(**dummy_arguments(model, x, generator()))[0] for model, x in ((net, latent[:, :4]), (wide, latent))
        )
        assert before[0].std() > 0.01
        for a, b in zip(before, after, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONTROLS)
def test_controlnet_pipelines_are_upgraded_whole(name: str, tmp_path: Path) -> None:
    base = controlled(name, controlnet(name))
    pipe = upgrade_pipeline(base, autoencoder(name))
    assert pipe.controlnet is not base.controlnet
    assert base.controlnet.config.in_channels * 3 == pipe.controlnet.config.in_channels
    side = call_arguments(name, scale=2)["height"]
    control = torch.rand(1, 3, side, side, generator=generator())
    made = image(pipe, name, control_image=control)
    assert made.shape == (1, 3, side, side)
    assert (made - image(pipe, name, control_image=1 - control)).abs().max() > 1e-3, "the control takes part"
    pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(image(load_pipeline(tmp_path), name, control_image=control), made)


def test_several_controlnets() -> None:
    base = controlled("flux", [controlnet("flux"), controlnet("flux", num_mode=2)])
    pipe = upgrade_pipeline(base, autoencoder("flux"))
    assert type(pipe.controlnet) is FluxMultiControlNetModel
    control = [torch.rand(1, 3, 64, 64, generator=generator())] * 2
    made = image(pipe, "flux", control_image=control, control_mode=[0, 1], controlnet_conditioning_scale=[1.0, 0.5])
    assert made.isfinite().all()


def test_a_second_transformer_is_widened_too() -> None:
    base = ideogram4()
    vae = AutoencoderDA.from_base(base.vae, detail_channels=DETAILS)
    pipe = upgrade_pipeline(base, vae)
    for name in ("transformer", "unconditional_transformer"):
        before, after = getattr(base, name), getattr(pipe, name)
        assert after.config.in_channels == 3 * before.config.in_channels
        kept = after.input_proj.weight.unflatten(1, (4, 12))[:, :, :4].flatten(1)
        assert torch.equal(kept, before.input_proj.weight)
    assert torch.equal(pipe.vae.bn.running_mean.view(4, 12)[:, :4].flatten(), base.vae.bn.running_mean)
    assert not pipe.vae.bn.running_mean.view(4, 12)[:, 4:].any()
    assert torch.equal(pipe.vae.bn.running_var.view(4, 12)[:, :4].flatten(), base.vae.bn.running_var)
    base.unconditional_transformer = base.transformer
    shared = upgrade_pipeline(base, vae)
    assert shared.unconditional_transformer is shared.transformer


@pytest.mark.parametrize("kind", ["pixels", "borrowed", "z-image", "hook"])
def test_a_part_that_cannot_be_widened_is_named(kind: str) -> None:
    if kind == "pixels":
        base = controlled("flux", controlnet("flux", conditioning_embedding_channels=4 * 4))
    elif kind == "borrowed":
        base = controlled("sd3", controlnet("sd3"))
        base.controlnet.register_to_config(use_pos_embed=False)
    elif kind == "z-image":
        base = controlled("flux", controlnet("flux"))
        net = ZImageControlNetModel([0], control_in_dim=4, dim=16, n_heads=2, n_kv_heads=2, n_refiner_layers=1)
        base.register_modules(controlnet=net)
    else:
        base = controlled("flux", controlnet("flux"))
        base.controlnet.x_embedder.register_forward_hook(lambda *_: None)
    with pytest.raises(WarmStartError, match=rf"the controlnet of this {type(base).__name__}, a \w+ControlNetModel"):
        upgrade_pipeline(base, autoencoder("sd3" if kind == "borrowed" else "flux"))


# ---------------------------------------------------------------------- state beside weights and configuration


class Quantised(Tensor):
    """Plays a weight of torchao."""


def quantised_weight(part: Any) -> None:
    layer = next(module for module in part.modules() if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Quantised), requires_grad=False)


def user_hook(part: Any) -> None:
    next(m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)).register_forward_hook(
        lambda *_: None
    )


def other_forward(part: Any) -> None:
    layer = next(m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d))
    layer.forward = lambda x: nn.functional.silu(x)


def cast_layerwise(part: Any) -> None:
    part.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def compiled_block(part: Any) -> None:
    name, child = next(iter(part.named_children()))
    setattr(part, name, torch.compile(child))


STATES = {
    "not plain tensors": quantised_weight,
    "a hook on": user_hook,
    "a replaced forward": other_forward,
    "hooks of diffusers": cast_layerwise,
    "the compiled part": compiled_block,
    "parametrizations": lambda part: torch.nn.utils.parametrizations.weight_norm(
        next(m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    ),
}


@pytest.mark.parametrize("part", ["transformer", "vae"])
@pytest.mark.parametrize("state", STATES)
def test_state_that_cannot_be_carried_over_is_refused_with_one_message(state: str, part: str) -> None:
    base = small_pipeline("sd3")
    STATES[state](getattr(base, part))
    with pytest.raises(DavaeError, match=rf"has .*{state}.*switch it off \(.*\), upgrade, then switch it on"):
        upgrade_pipeline(base, autoencoder("sd3"))


def test_a_step_cache_a_quantiser_and_an_ip_adapter_are_refused() -> None:
    base = small_pipeline("flux")
    base.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(WarmStartError, match=r"hooks of diffusers .*disable_cache"):
        upgrade_pipeline(base, autoencoder("flux"))
    base.transformer.disable_cache()
    assert upgrade_pipeline(base, autoencoder("flux")).transformer.config.in_channels == 4 * (4 + DETAILS)
    base.transformer.register_to_config(quantization_config={"quant_method": "torchao"})
    with pytest.raises(WarmStartError, match="has quantised weights"):
        upgrade_pipeline(base, autoencoder("flux"))
    base = small_pipeline("sd3")

    class SD3IPAdapterJointAttnProcessor2_0(nn.Module):
        pass

    base.transformer.transformer_blocks[0].attn.processor = SD3IPAdapterJointAttnProcessor2_0()
    with pytest.raises(WarmStartError, match=r"an IP-Adapter on .*unload_ip_adapter\(\)"):
        upgrade_pipeline(base, autoencoder("sd3"))


def test_all_of_it_is_switched_on_after_the_upgrade() -> None:
    _, pipe = base_and_upgraded("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert image(pipe, "flux").isfinite().all()
    pipe.transformer.disable_cache()
    seen = []
    pipe.transformer.x_embedder.register_forward_hook(lambda *_: seen.append(1))
    pipe.vae = copy.deepcopy(pipe.vae)
    cast_layerwise(pipe.vae)
    cast_layerwise(pipe.transformer)
    assert image(pipe, "flux").isfinite().all()
    assert seen


def test_compiled_models_are_unwrapped_at_every_entry(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    """Nothing is run compiled here: it is the wrapper that stands in the way."""
    base = small_pipeline("lumina2")
    vae = AutoencoderDA.from_base(torch.compile(base.vae), detail_channels=DETAILS)
    assert vae.config.base_class == "AutoencoderKL"
    base.transformer, base.vae = torch.compile(base.transformer), torch.compile(base.vae)
    with caplog.at_level(logging.WARNING):
        pipe = upgrade_pipeline(base, torch.compile(vae))
    assert "the transformer was compiled" in caplog.text
    assert "switch it on again" in caplog.text
    assert type(unwrapped(pipe.transformer)) is diffusers.Lumina2Transformer2DModel
    pipe.transformer, plain = torch.compile(pipe.transformer), pipe.transformer
    attach_lora(pipe.transformer, LoraConfig(r=1, target_modules=["to_q"], init_lora_weights=False))
    davae.save_adapters(pipe, tmp_path)
    names = {key for key in load_file(tmp_path / "davae_adapter.safetensors") if key.startswith("transformer.")}
    assert not any("_orig_mod" in name for name in names)
    again = davae.load_adapters(base, torch.compile(vae), tmp_path)
    assert torch.equal(again.transformer.x_embedder.weight, plain.x_embedder.weight)
    merge_lora(pipe.transformer)
    assert not any("lora" in name for name in plain.state_dict())
    fitted = fit_to_autoencoder(type(pipe)(**pipe.components | {"vae": torch.compile(pipe.vae)}))
    assert fitted.vae_scale_factor == pipe.vae_scale_factor


def test_what_was_switched_on_for_the_base_vae_is_told(caplog: pytest.LogCaptureFixture) -> None:
    base = small_pipeline("sd3")
    base.vae.enable_tiling()
    with caplog.at_level(logging.WARNING):
        upgrade_pipeline(base, autoencoder("sd3"))
    assert "the VAE's tiling was on" in caplog.text


@pytest.mark.parametrize("name", ["lumina2", "flux"])
def test_upgraded_pipelines_can_be_copied_and_their_models_pickled(name: str) -> None:
    _, pipe = base_and_upgraded(name)
    twin = pickle.loads(pickle.dumps(pipe.transformer))  # noqa: S301 (its own)
    pipe.transformer, plain = twin, pipe.transformer
    made = image(pipe, name)
    pipe.transformer = plain
    assert torch.equal(made, image(pipe, name))
    assert image(copy.deepcopy(pipe), name).isfinite().all()


# ---------------------------------------------------------------------- sizes


@pytest.mark.parametrize(("name", "size", "ways"), [("sana", 160, "128 or 192"), ("pixart-sigma", 72, "64 or 96")])
def test_sizes_between_steps_are_refused_where_the_class_refuses_them(name: str, size: int, ways: str) -> None:
    _, pipe = base_and_upgraded(name)
    with pytest.raises(DavaeError, match=rf"width {size} does not fit this .*Ask for {ways}"):
        image(pipe, name, width=size)
    fitting = int(ways.split()[-1])
    assert image(pipe, name, width=fitting).shape[-1] == fitting


def test_classes_that_round_go_on_rounding_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    base, pipe = base_and_upgraded("flux")
    said = []
    for one, size in ((base, 36), (pipe, 72)):
        diffusers.utils.logging.get_logger("diffusers").propagate = True
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            caplog.clear()
            made = image(one, "flux", width=size, height=size)
        said.append("divisible by" in caplog.text)
        assert made.shape[-1] == size - size % (size // 4.5)
    assert said == [True, True]


@pytest.mark.parametrize("name", [name for name in SMALL_PIPELINES if name != "dit"])
def test_no_pipeline_gives_another_size_without_a_word(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Every multiple of 8 either comes out as asked for, or there is an error or a warning."""
    _, pipe = base_and_upgraded(name)
    side = call_arguments(name, scale=2)["width"]
    diffusers.utils.logging.get_logger("diffusers").propagate = True
    for size in range(side, 2 * side, side // 4 or 8):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            try:
                made = image(pipe, name, width=size).shape[-1]
            except ValueError:
                continue
        assert made == size or "divisible by" in caplog.text, (size, made)


# ---------------------------------------------------------------------- LoRA


def base_lora(name: str, targets: list[str], folder: Path) -> DiffusionPipeline:
    """A LoRA of the base, saved by diffusers itself; the base that carries it."""
    base = small_pipeline(name)
    torch.manual_seed(2)
    base.transformer.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    attached = attached_lora(base.transformer)
    assert attached is not None
    weights = get_peft_model_state_dict(base.transformer)
    type(base).save_lora_weights(folder, weights, transformer_lora_adapter_metadata=lora_metadata(attached[1]))
    return base


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("sd3", ["to_q", "proj_out", "pos_embed.proj"]),
        ("flux", ["to_q", "x_embedder", "proj_out"]),
        ("qwenimage", ["img_in", "proj_out"]),
        ("sana", ["patch_embed.proj", "proj_out"]),
        ("lumina2", ["x_embedder", "norm_out.linear_2"]),
        ("auraflow", ["pos_embed.proj", "proj_out"]),
    ],
)
def test_loras_of_the_base_on_embedder_and_head_are_padded(name: str, targets: list[str], tmp_path: Path) -> None:
    base = base_lora(name, targets, tmp_path)
    plain, pipe = base_and_upgraded(name)
    latent = torch.randn(2, 4 + DETAILS, 8, 8, generator=generator())
    described = description_of(pipe.transformer).fitted(pipe.transformer, 4 + DETAILS)
    sizes = described.resolve_sizes(pipe.transformer)
    wide, narrow = (
        dummy_arguments(part, x, generator())
        for part, x in ((pipe.transformer, latent), (plain.transformer, latent[:, :4]))
    )

    @torch.no_grad()
    def base_part() -> Tensor:
        with unguarded(pipe.transformer):
            made = pipe.transformer(**wide, return_dict=False)[0]
        kept, new = split_axis(made, described.sample_axis, described.sample_pattern, sizes, LAYOUT, name="output")
        assert not new.any()
        return kept

    before = base_part()
    pipe.load_lora_weights(tmp_path)
    for layer in targets:
        adapted = [m for n, m in pipe.transformer.named_modules() if n.endswith(layer)]
        assert any("default_0" in getattr(module, "lora_A", ()) for module in adapted), layer
    with torch.no_grad():
        expected = base.transformer(**narrow, return_dict=False)[0]
    torch.testing.assert_close(base_part(), expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 1e-2


def test_padding_leaves_what_fits_as_it_is() -> None:
    _, pipe = base_and_upgraded("sd3")
    own = {
        "proj_out.lora_B.weight": torch.ones(48, 2),
        "transformer_blocks.0.ff.proj_out.lora_B.weight": torch.ones(4, 2),
    }
    padded = padded_lora(pipe.transformer, LAYOUT, own | {"pos_embed.proj.lora.down.weight": torch.ones(2, 4, 2, 2)})
    assert padded["proj_out.lora_B.weight"] is own["proj_out.lora_B.weight"]
    assert padded["pos_embed.proj.lora.down.weight"].shape == (2, 12, 2, 2)


def tuned(name: str = "sd3", **config: Any) -> DiffusionPipeline:
    pipe = upgraded(small_pipeline(name), detail_channels=DETAILS)
    torch.manual_seed(1)
    pipe.transformer.add_adapter(
        LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": ["to_q", "to_v"], "init_lora_weights": False} | config)
    )
    return pipe


@pytest.mark.parametrize("weight", [0.5, 0.0, -2.0])
def test_the_weight_of_a_lora_is_saved_as_it_acts(weight: float, tmp_path: Path) -> None:
    pipe = tuned(alpha_pattern={"transformer_blocks.1.attn.to_q": 4}, use_rslora=True)
    pipe.set_adapters("default", weight)
    expected = image(pipe, "sd3")
    davae.save_adapters(pipe, tmp_path)
    torch.testing.assert_close(image(davae.load_adapters(small_pipeline("sd3"), pipe.vae, tmp_path), "sd3"), expected)
    pipe.transformer.delete_adapters("default")
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(image(pipe, "sd3"), expected)
    merge_lora(pipe.transformer)
    torch.testing.assert_close(image(pipe, "sd3"), expected, rtol=0, atol=2e-5)


def card(folder: Path) -> Path:
    (folder / "base").mkdir()
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder / "base"


def switched_off(pipe: DiffusionPipeline) -> None:
    pipe.transformer.disable_adapters()


def off_in_one_layer(pipe: DiffusionPipeline) -> None:
    pipe.transformer.transformer_blocks[0].attn.to_q.enable_adapters(False)


def uneven(pipe: DiffusionPipeline) -> None:
    pipe.transformer.transformer_blocks[0].attn.to_q.set_scale("default", 0.25)


@pytest.mark.parametrize("state", [switched_off, off_in_one_layer, uneven])
def test_a_lora_that_no_file_can_tell_is_refused_by_both_savers(state: Any, tmp_path: Path) -> None:
    pipe = tuned()
    state(pipe)
    message = "give it one weight" if state is uneven else "is switched off in"
    for save in (
        lambda: davae.save_adapters(pipe, tmp_path / "a"),
        lambda: davae.save_pipeline(pipe, tmp_path / "b", base_model=str(card(tmp_path))),
    ):
        with pytest.raises(DavaeError, match=message):
            save()
    assert not (tmp_path / "b" / "transformer").exists()


def test_modules_to_save_are_refused_or_unwrapped(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["norm_out"])
    with pytest.raises(DavaeError, match=r"modules_to_save .*norm_out.*Leave it out"):
        attach_lora(upgraded(small_pipeline("sd3")).transformer, config)
    pipe = tuned(modules_to_save=["norm_out", "proj_out"])
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if "modules_to_save" in name:
                parameter += 0.1
    expected = image(pipe, "sd3")
    with pytest.raises(DavaeError, match=r"(norm_out|proj_out) was trained whole .*save_pipeline"):
        davae.save_adapters(pipe, tmp_path / "adapters")
    davae.save_pipeline(pipe, tmp_path / "merged", base_model=str(card(tmp_path)))
    torch.testing.assert_close(image(load_pipeline(tmp_path / "merged"), "sd3"), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(image(pipe, "sd3"), expected)


def test_a_save_over_a_sharded_folder_can_be_read(tmp_path: Path) -> None:
    _, pipe = base_and_upgraded("sd3")
    folder = tmp_path / "fox"
    pipe.save_pretrained(folder, max_shard_size="20KB")
    assert list(folder.glob("transformer/*.index.json"))
    davae.save_pipeline(pipe, folder, base_model=str(card(tmp_path)))
    assert not list(folder.glob("*/*.index.json"))
    torch.testing.assert_close(image(load_pipeline(folder), "sd3"), image(pipe, "sd3"))
    pipe.vae.save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    pipe.vae.save_pretrained(tmp_path / "vae")
    davae.AutoencoderDA.from_pretrained(tmp_path / "vae")


@pytest.mark.parametrize("name", ["lumina2", "sana"])
def test_pipelines_without_a_part_are_opened_as_those_of_diffusers(name: str, tmp_path: Path) -> None:
    """People leave the transformer out to encode prompts alone."""
    _, pipe = base_and_upgraded(name)
    pipe.save_pretrained(tmp_path)
    opened = load_pipeline(tmp_path, transformer=None)
    assert opened.transformer is None
    assert opened.vae_scale_factor == pipe.vae_scale_factor
