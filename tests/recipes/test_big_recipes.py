from importlib import resources

import pytest
import yaml

from davae.planner.architectures import find_architecture
from davae.planner.recipes import _diffusion_run, dry_run, recipe_plan
from davae.planner.stages import target_counts
from davae.planner.text import inference_line, stage_line
from davae.recipes.presets import find_preset
from davae.recipes.read import load_recipe

BIG = (
    "sd35-medium-1024",
    "sd35-medium-2048",
    "sd35-medium-2048-x4",
    "sd35-large-1024",
    "flux1-dev-2048",
    "sana-1024-f64",
    "pixart-sigma-2048",
)


@pytest.mark.parametrize("name", BIG)
def test_recipe_names_a_bundled_base_and_layers_that_exist(name):
    recipe = load_recipe(name)
    assert find_preset(recipe.base) is not None
    architecture = find_architecture(recipe.base)
    run = _diffusion_run(recipe, architecture)
    counts = target_counts(architecture.build_transformer(), run.lora_targets)
    assert all(counts.values()), counts


@pytest.mark.slow
@pytest.mark.parametrize("name", BIG)
def test_comments_say_what_the_planner_expects(name):
    made = recipe_plan(load_recipe(name))
    text = (resources.files("davae.recipes") / f"{name}.yaml").read_text()
    for line in (inference_line(made), stage_line(made, "autoencoder"), stage_line(made, "diffusion")):
        assert f"#   {line}\n" in text


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
