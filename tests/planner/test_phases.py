"""The planner's memory of each phase beside what the code really does, on the meta device.

    python -m tests.planner.test_phases

writes the table of docs/memory.md, which a test compares.
"""

from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch

from davae.pipelines.families import find_family
from davae.planner.architectures import find_architecture
from davae.planner.memory import checkpointing, cost_of, drop_gradients
from davae.planner.phases import Phase
from davae.planner.plan import Plan
from davae.planner.recipes import _detail_channels, plan_upgrade, recipe_plan
from davae.recipes.presets import find_preset
from davae.recipes.read import load_recipe, recipe_names
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.pixel_budget import images_together
from davae.training.autoencoder.losses import make_gan_loss
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.diffusion.inputs import encode_images


def _real() -> list[str]:
    """The bundled recipes over bases with a bundled configuration."""
    found = {name: load_recipe(name) for name in recipe_names()}
    return [n for n, r in found.items() if isinstance(r, UpgradeRecipe) and find_preset(r.base) is not None]


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


PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
BEGIN, END = "<!-- phases: generated -->\n", "<!-- end -->\n"
CARDS = {"sd35-medium-1024": 24}
"""Gigabytes of the card that a recipe is made for; others are for 80."""
SPARE = 0.1
"""Of a card, for its context and what the allocator rounds and cannot join."""
HEAD = (
    "| recipe | stage 1: start, step, validation, export | cache: images, text | stage 2: start, step, validation, "
    "export | main memory at most | card |\n|---|---|---|---|---|---|\n"
)


def _row(name: str) -> str:
    phases = _plan(name).phases
    cells = [", ".join(f"{one.device_bytes / 1e9:.1f}" for one in found.values()) for found in phases.values()]
    host = max(one.host_bytes for found in phases.values() for one in found.values())
    return f"| `{name}` | {' | '.join(cells)} | {host / 1e9:.0f} | {CARDS.get(name, 80)} GB |\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", _real())
def test_a_recipe_fits_its_card_in_every_phase_as_the_page_says(name: str) -> None:
    for stage, phases in _plan(name).phases.items():
        for phase, needed in phases.items():
            most = (1 - SPARE) * CARDS.get(name, 80) * 1e9
            assert needed.device_bytes <= most, (stage, phase, needed.to_json())
    assert _row(name) in PAGE.read_text(encoding="utf-8")


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


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + HEAD + "".join(map(_row, _real())) + END + after, encoding="utf-8")
