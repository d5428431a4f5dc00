"""Every trained weight of every objective gets a gradient in every step; DDP stops at the first one without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.end_to_end.families import stage

from davae.bases.debug_pipelines import SMALL_PIPELINES
from davae.bases.tiny import debug_base
from davae.data import collate, open_dataset
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.families import family_of
from davae.recipes.dc_ae import DcArchitecture, HeadPhase, KlArchitecture, LatentPhase
from davae.recipes.read import load_recipe
from davae.training.autoencoder.plain_objective import plain_modules
from davae.training.autoencoder.stage import AutoencoderStage
from davae.training.autoencoder.train import new_level
from davae.training.base.autoencoder_stage import BaseAutoencoderStage
from davae.training.dc_ae.stage import build_autoencoder, trained_layers
from davae.training.diffusion import DiffusionStage
from davae.training.diffusion.tuning import _suffix
from davae.training.stage import TrainedModule

PLAIN = ["diffusion.loop.gradient_checkpointing=false"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd3, dual attention in all blocks": ("sd3", {"dual_attention_layers": (0, 1)}),
    "sd3, dual attention in none": ("sd3", {"dual_attention_layers": (), "qk_norm": None}),
    "flux, not distilled": ("flux", {"guidance_embeds": False}),
    "flux, more blocks": ("flux", {"num_layers": 2, "num_single_layers": 2}),
    "sana, queries normalised": ("sana", {"qk_norm": "rms_norm_across_heads"}),
    "lightningdit, plain": ("debug", {"qk_norm": False, "rope": False, "swiglu": False}),
}


def without_gradient(modules: list[TrainedModule], batch: dict[str, Any], step: int = 0) -> list[str]:
    """Names of the trained parameters that a step of each module leaves without one."""
    missing = []
    for trained in modules:
        trained.module.train()(batch, step)["total"].backward()
        named = {name: p for name, p in trained.module.named_parameters() if p.requires_grad}
        assert named
        missing += [f"{trained.name}: {name}" for name, p in named.items() if p.grad is None]
    return missing


def learns_all(made: DiffusionStage) -> list[str]:
    batch = collate([made.dataset[i] for i in range(2)])
    return without_gradient(made.modules, {k: v for k, v in batch.items() if k != "skipped"})


@pytest.mark.parametrize("mode", ["full", "lora", "new_channels"])
@pytest.mark.parametrize("name", ["debug", *SMALL_PIPELINES])
def test_every_family_and_mode(name: str, mode: str) -> None:
    assert learns_all(stage(name, *PLAIN, f"diffusion.tune.mode={mode}")) == []


@pytest.mark.parametrize("name", ["debug", *SMALL_PIPELINES])
def test_a_lora_on_every_linear_layer(name: str) -> None:
    linear = [n for n, m in stage(name).pipeline.transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    targets = {_suffix(n.removesuffix(".base_layer")) for n in linear if "lora_" not in n}
    assert learns_all(stage(name, *PLAIN, f"diffusion.tune.lora.targets=[{','.join(sorted(targets))}]")) == []


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_small_pipelines_lack(variant: str) -> None:
    name, config = VARIANTS[variant]
    assert learns_all(stage(name, *PLAIN, "diffusion.tune.mode=full", **config)) == []


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("name", ["dit", "pixart-sigma"])
def test_a_learned_variance(name: str, weight: float) -> None:
    options = ["diffusion.tune.mode=full", f"diffusion.loss.variance_weight={weight}"]
    assert learns_all(stage(name, *PLAIN, *options)) == []


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_idle_layers_are_frozen_and_carry_no_adapter(mode: str) -> None:
    targets = "[to_q,to_add_out,txt_mlp.net.0.proj,txt_mlp.net.2]"
    made = stage("qwenimage", f"diffusion.tune.mode={mode}", f"diffusion.tune.lora.targets={targets}")
    transformer = made.pipeline.transformer
    idle = family_of(made.pipeline).idle_layers(transformer)
    assert idle == ["transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.txt_mlp"]
    inside = {n: p for n, p in transformer.named_parameters() if n.startswith(tuple(idle))}
    assert len(inside) == 6
    assert not any(p.requires_grad for p in inside.values())
    with pytest.raises(DavaeError, match=r"nothing uses the output of 'transformer_blocks\.1\.txt_mlp\.net\.2'"):
        stage("qwenimage", f"diffusion.tune.lora.targets=[{idle[1]}.net.2]")
    before = {n: p for n, p in transformer.named_parameters() if n.startswith("transformer_blocks.0.txt_mlp")}
    assert any(p.requires_grad for p in before.values())


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("levels", ["sequential", "together"])
@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_the_upgraded_autoencoder_and_its_discriminators(adaptive: str, levels: str, step: int) -> None:
    options = [f"autoencoder.alignment.adaptive={adaptive}", f"autoencoder.levels={levels}"]
    options += [f"autoencoder.reconstruction.gan.adaptive={adaptive}", "autoencoder.reconstruction.gan.start_step=3"]
    recipe = load_recipe("debug", ["autoencoder.model.scale=4", "autoencoder.model.detail_channels=[8,16]", *options])
    vae: AutoencoderDA | Any = debug_base().vae
    for channels in (8, 16):
        vae = new_level(vae, recipe.autoencoder.model, channels)
    images = open_dataset("procedural:2", resolution=64)
    made = AutoencoderStage(vae, recipe.autoencoder, images, images)
    assert len(made.modules) == (3 if levels == "together" else 2)
    batch = {"image": torch.stack([images[i]["image"] for i in range(2)])}
    assert without_gradient(made.modules, batch, step) == []


def test_the_autoencoder_of_a_new_base() -> None:
    recipe = load_recipe("tiny-base", ["autoencoder.architecture.block_out_channels=[8,8]"])
    images = open_dataset("procedural:2", resolution=32)
    made = BaseAutoencoderStage(recipe.autoencoder, images, images, images)
    batch = {"image": torch.stack([images[i]["image"] for i in range(2)])}
    assert without_gradient(made.modules, batch, recipe.autoencoder.loop.steps) == []


DC = DcArchitecture(
    family="dc",
    block_out_channels=[8, 8, 16, 16],
    latent_channels=4,
    encoder_layers=[0, 1, 1, 1],
    decoder_layers=[0, 1, 1, 1],
    attention_head_dim=8,
)
KL = KlArchitecture(
    family="kl", block_out_channels=[8, 8, 8, 8], latent_channels=4, layers_per_block=1, norm_num_groups=4
)


@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize("shape", [DC, DC.model_copy(update={"residual_autoencoding": False}), KL])
def test_the_phases_of_dc_ae(shape: DcArchitecture | KlArchitecture, phase: int) -> None:
    recipe = load_recipe("debug")
    autoencoder = build_autoencoder(shape)
    section = {1: None, 2: LatentPhase, 3: HeadPhase}[phase]
    chosen = None if section is None else section.model_construct(stages=1)
    layers = [autoencoder] if chosen is None else trained_layers(autoencoder, chosen)
    gan = recipe.autoencoder.reconstruction.gan.model_copy(update={"weight": 0.1 * (phase == 3)})
    settings = recipe.autoencoder.reconstruction.model_copy(update={"gan": gan})
    _, modules = plain_modules(autoencoder, layers, settings, recipe.autoencoder.optimizer)
    batch = {"image": torch.rand(2, 3, 32, 32) * 2 - 1}
    assert without_gradient(modules, batch, 5) == []
