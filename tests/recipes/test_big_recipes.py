"""The recipes of real bases: what their comments and docs say is what the planner computes.

python -m tests.recipes.test_big_recipes    # writes the comments anew
"""

from contextlib import nullcontext
from functools import cache
from importlib import resources
from pathlib import Path

import pytest
import torch
import yaml

import davae
from davae.pipelines.families import find_family
from davae.planner.architectures import find_architecture
from davae.planner.memory import checkpointing, cost_of, drop_gradients
from davae.planner.plan import VARIANTS
from davae.planner.recipes import _detail_channels, _diffusion_run, dry_run, recipe_plan
from davae.planner.stages import target_counts
from davae.planner.text import inference_line, stage_line
from davae.recipes.presets import find_preset
from davae.recipes.read import load_recipe, recipe_names
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.pixel_budget import images_together
from davae.training.autoencoder.losses import make_gan_loss
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.diffusion.inputs import encode_images
from tests.recipes import pages

BIG = (
    "sd35-medium-1024",
    "sd35-medium-2048",
    "sd35-medium-2048-x4",
    "sd35-large-1024",
    "flux1-dev-2048",
    "sana-1024-f64",
    "pixart-sigma-2048",
)
PAGE = Path(__file__).parents[2] / "docs" / "memory.md"


@cache
def _plan(name, *overrides):
    return recipe_plan(load_recipe(name, overrides))


@pytest.mark.parametrize("name", BIG)
def test_recipe_names_a_bundled_base_and_layers_that_exist(name):
    recipe = load_recipe(name)
    assert find_preset(recipe.base) is not None
    architecture = find_architecture(recipe.base)
    run = _diffusion_run(recipe, architecture)
    counts = target_counts(architecture.build_transformer(), run.lora_targets)
    assert all(counts.values()), counts


def expected_lines(name: str) -> list[str]:
    """What the planner expects of a recipe. The speed-up is an image's, with text and decoding."""
    made = _plan(name)
    return [inference_line(made), stage_line(made, "autoencoder"), stage_line(made, "diffusion")]


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_comments_say_what_the_planner_expects(name):
    lines = (resources.files("davae.recipes") / f"{name}.yaml").read_text("utf-8").splitlines()
    assert [line for line in lines if line.startswith("#   ")] == [f"#   {line}" for line in expected_lines(name)], (
        "write the comments anew with `python -m tests.recipes.test_big_recipes`"
    )


@pytest.mark.slow
def test_results_and_speed_say_what_the_planner_computes():
    text = "".join((PAGE.parent / page).read_text(encoding="utf-8") for page in ("results.md", "speed.md"))
    medium, large, levels = (_plan(f"sd35-medium-{size}") for size in ("1024", "2048", "2048-x4"))
    whole, larger, levels4 = (f"{plan.speedup_with_decoding['upgraded']:.2f}" for plan in (medium, large, levels))
    assert f"{whole} times fewer operations, text and decoding included" in text
    fewer = f"{larger} times fewer operations at scale 2, {levels4} at"
    assert f"| computed: {fewer} scale 4, text and decoding included; not timed |" in text
    rows = {
        "image tokens": [f"{medium.tokens[v]:,}" for v in VARIANTS],
        f"transformer, TFLOP a step (guidance, {medium.text_tokens} text tokens)": [
            f"{medium.flops_per_step[v] / 1e12:.3g}" for v in VARIANTS
        ],
        "decoder, TFLOP": [f"{medium.decode_flops[v] / 1e12:.2f}" for v in VARIANTS],
    }
    for head, cells in rows.items():
        assert f"| {head} | {' | '.join(cells)} |\n" in text
    transformer = f"{medium.speedup['upgraded']:.2f}"
    assert f"operations fall by {transformer}; with text encoding and decoding by {whole}." in text


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_dry_run_of_a_small_recipe_is_its_yaml_with_findings_in_comments(stage):
    recipe = load_recipe("debug")
    text = dry_run(recipe, stage)
    assert yaml.safe_load(text) == recipe.model_dump(mode="json")
    assert "# image [3, 32, 32] -> latent [12, 4, 4]" in text
    assert ("# widened layers" in text) == (stage == "diffusion")


def test_dry_run_tells_of_missing_images():
    text = dry_run(load_recipe("debug", ["data.path=no/such/folder"]), "autoencoder")
    assert "no/such/folder is not here" in text


SPARE = 0.1  # of a card: the CUDA context, what the allocator rounds and cannot join
BEGIN, END = "<!-- phases: generated -->\n", "<!-- end -->\n"
CARDS = {"sd35-medium-1024": 24}
"""Gigabytes of the card that a recipe is made for; others are for 80."""
HEAD = (
    "| recipe | stage 1: start, step, validation, export | cache: images, text | stage 2: start, step, validation, "
    "export | main memory at most | card |\n|---|---|---|---|---|---|\n"
)


def _row(name: str) -> str:
    phases = _plan(name).phases
    cells = [", ".join(f"{one.device_bytes / 1e9:.1f}" for one in found.values()) for found in phases.values()]
    host = max(one.host_bytes for found in phases.values() for one in found.values())
    return f"| `{name}` | {' | '.join(cells)} | {host / 1e9:.0f} | {CARDS.get(name, 80)} GB |\n"


def _real() -> list[str]:
    """The bundled recipes over bases with a bundled configuration."""
    found = {name: load_recipe(name) for name in recipe_names()}
    return [n for n, r in found.items() if isinstance(r, UpgradeRecipe) and find_preset(r.base) is not None]


@pytest.mark.slow
@pytest.mark.parametrize("name", _real())
def test_stage_1_takes_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of the objective itself, and the encoding of images."""
    without_lpips = "autoencoder.reconstruction.lpips_weight=0"  # a package of its own
    recipe, plan = load_recipe(name, [without_lpips]), _plan(name)
    assert isinstance(recipe, UpgradeRecipe)
    if load_recipe(name).autoencoder.reconstruction.lpips_weight:
        plan = _plan(name, without_lpips)
    settings, side = recipe.autoencoder, recipe.data.resolution
    architecture = find_architecture(recipe.base)
    vae = architecture.build_autoencoder(settings.model.scale, _detail_channels(recipe))
    mixed = settings.loop.precision != "no"
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
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
    planned = plan.phases["autoencoder"]["step"].device["activations"]
    assert found == pytest.approx(planned, rel=0.15)

    family = find_family(architecture.pipeline)
    images = torch.empty(images_together(side, side), 3, side, side, device="meta")
    encoding = cost_of(lambda: encode_images(family, vae, images), given=[*vae.parameters(), *vae.buffers()])
    assert encoding.peak_bytes == pytest.approx(plan.phases["cache"]["images"].device["activations"], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", _real())
def test_a_recipe_fits_its_card_in_every_phase_as_the_page_says(name: str) -> None:
    for stage, phases in _plan(name).phases.items():
        for phase, needed in phases.items():
            most = (1 - SPARE) * CARDS.get(name, 80) * 1e9
            assert needed.device_bytes <= most, (stage, phase, needed.to_json())
    assert _row(name) in PAGE.read_text(encoding="utf-8")


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


if __name__ == "__main__":
    pages.replace(PAGE, BEGIN, END, HEAD + "".join(map(_row, _real())))
    for name in BIG:
        file = Path(davae.__file__).parent / "recipes" / f"{name}.yaml"
        lines = iter(expected_lines(name))
        whole = file.read_text(encoding="utf-8").split("\n")
        file.write_text(
            "\n".join(f"#   {next(lines)}" if line.startswith("#   ") else line for line in whole), encoding="utf-8"
        )
