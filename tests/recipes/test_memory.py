"""What docs/memory.md says fits on which GPU: computed with the planner on the meta device, from the recipes."""

from pathlib import Path

import pytest

from davae.planner.recipes import recipe_plan
from davae.recipes.read import load_recipe

PAGE = Path(__file__).parents[2] / "docs" / "memory.md"
SPARE = 0.1  # of a card: the CUDA context, what the allocator rounds and cannot join


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "overrides", "cards"),
    [
        ("sd35-medium-1024", ["autoencoder.loop.batch_size=1"], {"autoencoder": 24e9, "diffusion": 24e9}),
        ("flux1-dev-2048", [], {"autoencoder": 80e9, "diffusion": 80e9}),
    ],
)
def test_the_stages_fit_their_cards_and_the_page_says_the_figures(name, overrides, cards):
    recipe = load_recipe(name, overrides)
    assert recipe.data.resolution == int(name.split("-")[2])
    assert recipe.autoencoder.model.scale == 2
    made = recipe_plan(recipe)
    text = PAGE.read_text(encoding="utf-8")
    for stage, card in cards.items():
        needed = made.memory_bytes[stage]
        assert needed < (1 - SPARE) * card
        row = next(line for line in text.splitlines() if f"`{name}`" in line and _is_of(line, stage))
        assert row.endswith(f"| {needed / 1e9:.1f} GB |")
        assert f"| {card / 1e9:.0f} GB |" in row


def _is_of(row: str, stage: str) -> bool:
    return {"autoencoder": "stage 1", "diffusion": "stage 2"}[stage] in row


@pytest.mark.parametrize("name", ["sd35-medium-1024", "flux1-dev-2048"])
def test_the_recipes_switch_on_what_the_page_names(name):
    """Frozen weights in bfloat16 under adapters, blocks computed again, and nothing encoded while training."""
    recipe = load_recipe(name)
    assert (recipe.diffusion.tune.mode, recipe.diffusion.tune.frozen_dtype) == ("lora", "bfloat16")
    assert recipe.data.cache is not None
    for stage in (recipe.autoencoder, recipe.diffusion):
        assert stage.loop.gradient_checkpointing
        assert stage.loop.precision == "bf16"


def test_the_planner_counts_the_bytes_of_either_optimizer():
    option = "diffusion.optimizer.kind=adamw8bit"
    whole, small = (recipe_plan(load_recipe("debug-text", more)) for more in ([], [option]))
    parts = [made.memory_parts["diffusion"]["optimizer"] for made in (whole, small)]
    assert parts[0] == 4 * parts[1] > 0
