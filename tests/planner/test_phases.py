"""The planner's memory of each phase beside what the code really does, on the meta device."""

from contextlib import nullcontext
from functools import cache

import pytest
import torch

from davae.pipelines.families import find_family
from davae.planner.architectures import find_architecture
from davae.planner.memory import checkpointing, cost_of, drop_gradients
from davae.planner.phases import Phase
from davae.planner.plan import Plan
from davae.planner.recipes import _detail_channels, plan_upgrade, recipe_plan
from davae.recipes.read import load_recipe, recipe_names
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.pixel_budget import images_together
from davae.training.autoencoder.losses import make_gan_loss
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.diffusion.inputs import encode_images


def _real() -> list[str]:
    """The bundled recipes over bases that are not made in code."""
    found = {name: load_recipe(name) for name in recipe_names()}
    return [n for n, r in found.items() if isinstance(r, UpgradeRecipe) and "/" in r.base]


@cache
def _plan(name: str) -> Plan:
    return recipe_plan(load_recipe(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", _real())
def test_stage_1_takes_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the objective itself, and the encoding of images."""
    recipe = load_recipe(name)
    assert isinstance(recipe, UpgradeRecipe)
    settings, side = recipe.autoencoder, recipe.data.resolution
    architecture = find_architecture(recipe.base)
    vae = architecture.build_autoencoder(settings.model.scale, _detail_channels(recipe))
    mixed = settings.loop.precision != "no"
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    if settings.loop.gradient_checkpointing:
        vae.enable_gradient_checkpointing(checkpointing(mixed))
    with torch.device("meta"):
        gan_loss, _ = make_gan_loss(settings.reconstruction.gan, "discriminator")
        objective = StructuredObjective(vae, settings.alignment, settings.reconstruction, [gan_loss]).train()
        batch = {"image": torch.zeros(settings.loop.batch_size, 3, side, side)}
    drop_gradients(objective.parameters())

    def step() -> None:
        objective(batch, 1)["total"].backward()

    given = [*objective.parameters(), *objective.buffers()]
    found = cost_of(step, given=given, autocast=mixed).peak_bytes
    planned = _plan(name).phases["autoencoder"]["step"].device["activations"]
    assert found == pytest.approx(planned, rel=0.15)

    family = find_family(architecture.pipeline)
    images = torch.empty(images_together(side, side), 3, side, side, device="meta")
    encoding = cost_of(lambda: encode_images(family, vae, images), given=[*vae.parameters(), *vae.buffers()])
    assert encoding.peak_bytes == pytest.approx(_plan(name).phases["cache"]["images"].device["activations"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", _real())
def test_a_recipe_fits_its_card_in_every_phase(name: str) -> None:
    """One of 80 GB unless the recipe is named here, with a tenth to spare."""
    card = {"sd35-medium-1024": 24e9}.get(name, 80e9)
    for stage, phases in _plan(name).phases.items():
        for phase, needed in phases.items():
            assert needed.device_bytes <= 0.9 * card, (stage, phase, needed.to_json())


def test_the_phases_of_a_small_recipe() -> None:
    made = plan_upgrade(recipe="debug-text", overrides=["diffusion.tune.mode=lora", "data.resolution=64"])
    assert list(made.phases) == ["autoencoder", "cache", "diffusion"]
    assert list(made.phases["diffusion"]) == ["start", "step", "validation", "export"]
    assert made.phases["diffusion"]["step"].device == made.memory_parts["diffusion"]
    assert "autoencoder" not in made.phases["diffusion"]["step"].device  # it rests in main memory
    assert set(made.phases["cache"]["text"].device) == {"text encoders", "activations"}
    found = made.to_json()["phases"]["diffusion"]["validation"]
    assert found["device_bytes"] == sum(found["device"].values()) > 0


def test_a_phase_adds_up() -> None:
    phase = Phase({"a": 3, "b": 4}, {"program": 10}, {"copy": 5})
    assert (phase.device_bytes, phase.host_bytes, phase.together) == (7, 15, 17)
    assert phase.to_json()["host"] == {"program": 10, "copy": 5}


def test_more_pixels_change_validation() -> None:
    small, large = (plan_upgrade(recipe="debug", overrides=[f"data.resolution={side}"]).phases for side in (64, 128))
    for stage in ("autoencoder", "diffusion"):
        assert large[stage]["validation"].device_bytes > small[stage]["validation"].device_bytes
