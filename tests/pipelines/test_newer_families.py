"""Newer families, on small pipelines of the real classes: what is trained is what is sampled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, ZImagePipeline
from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas, _resolution_aware_mu
from peft import LoraConfig
from tests.pipelines.parts import CHAT, without_encoders
from tests.pipelines.parts import ideogram4 as ideogram
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from davae.bases import debug_text
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import attach_lora, upgrade_pipeline
from davae.pipelines.families import PipelineFamily, family_of, ideogram4
from davae.pipelines.families.family import unpack
from davae.pipelines.families.flux import Flux2Klein
from davae.pipelines.saving.adapters import load_adapters
from davae.pipelines.saving.opening import load_pipeline
from davae.recipes.read import load_recipe
from davae.training.runs.train import train_diffusion

NAMES = ["Flux2", "ZImage", "Krea2", "Chroma", "Ideogram4"]


@pytest.fixture(params=[1, 2], ids=["base", "upgraded"])
def scale(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def _pipeline(name: str, scale: int) -> tuple[DiffusionPipeline, dict[str, Any], PipelineFamily]:
    pipe, call = without_encoders(name)
    if scale == 1:
        call |= {"height": 32, "width": 48}
    else:
        pipe = upgrade_pipeline(pipe, AutoencoderDA.from_base(pipe.vae, detail_channels=8).eval())
    if name == "Flux2":
        pipe.transformer.register_to_config(guidance_embeds=False)  # as klein
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return pipe, call, family_of(pipe)


def _conditioning(name: str, call: dict[str, Any], pipe: Any = None) -> dict[str, torch.Tensor]:
    if name == "Ideogram4":
        return family_of(pipe).encode_prompts(pipe, call["prompt"], max_length=call["max_sequence_length"])
    embeds = call["prompt_embeds"]
    if name == "Flux2":
        return {"prompt_embeds": embeds}
    if name in ("Krea2", "Chroma"):
        return {key: call[key] for key in call if key.startswith("prompt_")}
    padded = torch.cat([embeds[0], torch.full((2, embeds[0].shape[1]), 9.0)])[None]
    return {"prompt_embeds": padded, "prompt_embeds_mask": torch.tensor([[True] * 3 + [False] * 2])}


@pytest.mark.parametrize("name", NAMES)
def test_predict_is_what_the_pipeline_steps_with(name: str, scale: int) -> None:
    pipe, call, family = _pipeline(name, scale)
    found, step = [], pipe.scheduler.step

    def recording(prediction: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **options: Any) -> Any:
        found.append((prediction.clone(), timestep, sample.clone()))
        return step(prediction, timestep, sample, **options)

    pipe.scheduler.step = recording
    pipe(**call | {"output_type": "latent"}, generator=torch.Generator().manual_seed(0))
    assert len(found) == 2
    for prediction, timestep, latents in found:
        if family.packed:
            height, width = (call[side] // pipe.vae_scale_factor for side in ("height", "width"))
            unpacked = ideogram4._unpack if name == "Ideogram4" else unpack
            prediction, latents = (unpacked(value, height, width) for value in (prediction, latents))
        with torch.no_grad():
            ours = family.predict(
                pipe.transformer, latents, timestep.reshape(1) / 1000, _conditioning(name, call, pipe)
            )
        assert prediction.std() > 1e-3
        torch.testing.assert_close(ours, prediction, atol=1e-5, rtol=1e-5)
        assert family.tokens(pipe.transformer, latents) == latents.shape[-1] * latents.shape[-2] // 4


@pytest.mark.parametrize("name", ["Flux2", "ZImage", "Ideogram4"])  # Krea 2 has Qwen-Image's autoencoder
def test_latents_are_what_the_pipeline_decodes(name: str, scale: int) -> None:
    """The pipeline's decoding of the latents of an image is the autoencoder's reconstruction of it."""
    pipe, call, family = _pipeline(name, scale)
    images = torch.rand(1, 3, call["height"], call["width"], generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents = family.latents_of(pipe.vae, images)
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda z, *args, **options: (decoded.append(z), decode(z, *args, **options))[1]
    end = latents
    if family.packed:  # the pipeline then has the place of the last step's result
        end = Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents))
    if name == "Ideogram4":
        end = ideogram4._pack(latents)
    pipe.scheduler.step = lambda *_, **__: (end,)
    pipe(**call, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = pipe.vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(decoded[0], raw, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_embeddings_are_the_pipelines_own(name: str) -> None:
    pipe, call, family = _pipeline(name, 2)
    guidance = 1.0 if name == "Flux2" else 2.0
    one = {key: value[0] for key, value in _conditioning(name, call, pipe).items()}
    empty = {key: value.flip(0) for key, value in one.items()}
    ours = family.sample(
        pipe,
        ["a fox"],
        height=64,
        width=96,
        num_inference_steps=2,
        guidance_scale=guidance,
        generators=[torch.Generator().manual_seed(3)],
        embeddings={"a fox": one, "": empty},
    )
    more: dict[str, Any] = {"guidance_scale": guidance}
    if name == "Chroma":
        more |= {f"negative_{key}": value[None] for key, value in empty.items()}
    if name == "Krea2":
        more = {"guidance_scale": 1.0} | {f"negative_{key}": value[None] for key, value in empty.items()}
    if name == "Ideogram4":  # asks its second transformer without a text
        more = {"guidance_scale": 2.0}
    if name == "ZImage":
        more["negative_prompt_embeds"] = [empty["prompt_embeds"][empty["prompt_embeds_mask"]]]
    expected = pipe(**call | more, generator=[torch.Generator().manual_seed(3)]).images
    torch.testing.assert_close(ours, expected * 2 - 1, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_adapter_and_the_widened_layers(name: str) -> None:
    pipe, call, family = _pipeline(name, 2)
    transformer = pipe.transformer.requires_grad_(False)
    attach_lora(transformer, LoraConfig(r=1, target_modules=list(family.lora_targets), init_lora_weights=False))
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    assert any("lora" in name for name in trained)
    noisy = torch.randn(1, pipe.vae.layout.channels, 8, 12)
    family.predict(transformer, noisy, torch.tensor([0.3]), _conditioning(name, call, pipe)).square().mean().backward()
    without = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not without


def test_prompts_of_z_image_are_padded_and_those_of_klein_have_three_layers() -> None:
    tokenizer = debug_text.qwen()["tokenizer"]
    tokenizer.chat_template = CHAT
    sizes = {**debug_text._DECODER, "head_dim": 8}
    z_image = ZImagePipeline(FlowMatchEulerDiscreteScheduler(), None, Qwen3Model(Qwen3Config(**sizes)), tokenizer, None)
    prompts = ["a fox", "", "a much longer text about a red fox in the snow"]
    found = family_of(z_image).encode_prompts(z_image, prompts, max_length=32)
    own, _ = z_image.encode_prompt(list(prompts), max_sequence_length=32, do_classifier_free_guidance=False)
    assert found["prompt_embeds"].shape == (3, 32, debug_text.WIDTH)
    for text, mask, expected in zip(found["prompt_embeds"], found["prompt_embeds_mask"], own, strict=True):
        torch.testing.assert_close(text[mask], expected, atol=1e-5, rtol=1e-4)
        assert not text[~mask].any()

    deep = Qwen3ForCausalLM(Qwen3Config(**sizes | {"num_hidden_layers": 28}))
    klein = Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), None, deep, tokenizer, None)
    found = family_of(klein).encode_prompts(klein, prompts, max_length=32)
    assert found["prompt_embeds"].shape == (3, 32, 3 * debug_text.WIDTH)
    torch.testing.assert_close(
        found["prompt_embeds"], klein.encode_prompt(prompts, max_sequence_length=32)[0], atol=1e-5, rtol=1e-4
    )


def test_an_empty_prompt_of_ideogram_is_its_image_alone_and_long_ones_are_refused() -> None:
    """The pass that the pipeline makes with its second transformer; texts are the pipeline's, in the encoder's type."""
    pipe, _, family = _pipeline("Ideogram4", 2)
    prompts = ["a fox", "", "a much longer text about a red fox in the snow"]
    pipe.text_encoder.to(torch.bfloat16)
    found = family.encode_prompts(pipe, prompts, max_length=80)
    own, _, _, indicator = pipe.encode_prompt([prompts[0], prompts[2]], 2, 3, 80, torch.device("cpu"))
    assert found["prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(found["prompt_embeds"][[0, 2]].float(), own[:, :80])
    assert torch.equal(found["prompt_embeds_mask"][[0, 2]], indicator[:, :80] == 3)
    assert not found["prompt_embeds_mask"][1].any()
    one = {key: value[1:2] for key, value in found.items()}
    noisy, level = torch.randn(1, pipe.vae.layout.channels, 4, 6), torch.tensor([0.3])
    ids = pipe._prepare_ids([0], 2, 3, 0, torch.device("cpu"))
    with torch.no_grad():
        alone = pipe.transformer(
            ideogram4._pack(noisy), 1 - level, torch.zeros(1, 6, own.shape[-1]), *ids, return_dict=False
        )[0]
        ours = family.predict(pipe.transformer, noisy, level, one)
    torch.testing.assert_close(ours, -ideogram4._unpack(alone, 4, 6), atol=1e-5, rtol=1e-5)
    assert family.tell_cut_prompts(pipe, prompts, 80) == 0
    count = int(found["prompt_embeds_mask"][2].sum())
    assert family.tell_cut_prompts(pipe, prompts, count) == 0
    with pytest.raises(DavaeError, match=rf"1 of 3 prompts have more .*set diffusion\.prompts\.max_length={count}"):
        family.tell_cut_prompts(pipe, prompts, count - 1)


def test_noise_levels_of_ideogram_are_shifted_by_the_size_in_pixels(scale: int) -> None:
    """The pipeline's levels are those of a logit-normal with deviation 1.5, shifted."""
    pipe, _, family = _pipeline("Ideogram4", scale)
    side = 1024
    tokens = (side // (2 * pipe.vae_scale_factor)) ** 2
    shift = family.timestep_shift(pipe, tokens)
    assert shift == pytest.approx(2)
    mu = _resolution_aware_mu(side, side, 0.0)
    quantiles = torch.linspace(0, 1, 9, dtype=torch.float64)[1:-1].flip(0)
    plain = torch.sigmoid(1.5 * torch.special.ndtri(quantiles))
    expected = _logit_normal_sigmas(8, mu, std=1.5)[1:]
    torch.testing.assert_close((shift * plain / (1 + (shift - 1) * plain)).float(), expected)


def test_a_tuned_ideogram_has_one_transformer(tmp_path: Path) -> None:
    """The base's second one, which knows no details, is not even read; the tuned one predicts without a text too."""
    base = ideogram()
    base.save_pretrained(tmp_path / "base")
    next((tmp_path / "base" / "unconditional_transformer").glob("*.safetensors")).unlink()
    recipe = load_recipe(
        "debug-text",
        [
            f"base={tmp_path / 'base'}",
            "data.resolution=64",
            "diffusion.prompts.max_length=80",
            "diffusion.tune.mode=lora",
        ]
        + [
            f"{stage}.loop.{key}"
            for stage in ("autoencoder", "diffusion")
            for key in ("steps=2", "validation_images=1")
        ],
    )
    vae = AutoencoderDA.from_base(base.vae, detail_channels=8)
    vae.save_pretrained(tmp_path / "vae")
    train_diffusion(recipe, tmp_path / "run", tmp_path / "vae")
    made = load_pipeline(tmp_path / "run")
    tuned = made.transformer.state_dict()
    assert all(torch.equal(value, tuned[name]) for name, value in made.unconditional_transformer.state_dict().items())
    assert not torch.equal(tuned["final_layer.linear.weight"][:, 0], base.transformer.final_layer.linear.weight[:, 0])
    adapted = load_adapters(base, tmp_path / "vae", tmp_path / "run" / "adapters")
    assert adapted.unconditional_transformer is adapted.transformer
    assert base.unconditional_transformer is not base.transformer


def test_the_shift_of_flux2_is_its_own_rule_unless_the_scheduler_has_a_fixed_one() -> None:
    pipe, _, family = _pipeline("Flux2", 1)
    assert isinstance(family, Flux2Klein)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    expected = math.exp(0.00016927 * 4400 + 0.45666666)  # above 4,300 tokens steps do not count
    assert family.timestep_shift(pipe, 4400) == pytest.approx(expected)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    assert family.timestep_shift(pipe, 4400) == 2.5
