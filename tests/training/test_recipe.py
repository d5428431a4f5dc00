"""Recipes: typed, strict, and every setting is read by some code."""

import copy
import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import davae
from davae.errors import DavaeError
from davae.training import settings as settings_module
from davae.training.recipe import differing_keys, dump_recipe, load_recipe, parse_recipe, recipe_names
from davae.training.run_directory import RunDirectory
from davae.training.settings import ReconstructionSettings, Section


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_reads_and_survives_a_round_trip(name):
    recipe = load_recipe(name)
    again = parse_recipe(yaml.safe_load(dump_recipe(recipe)), "round trip")
    assert again == recipe


def test_overrides_change_exactly_what_they_name():
    plain = load_recipe("tiny").model_dump(mode="json")
    changed = load_recipe(
        "tiny", ["data.path=photos/", "autoencoder.optimizer.learning_rate=1e-4", "autoencoder.loop.steps=7"]
    ).model_dump(mode="json")
    assert {d.split(":")[0] for d in differing_keys(changed, plain)} == {
        "data.path",
        "autoencoder.optimizer.learning_rate",
        "autoencoder.loop.steps",
    }
    assert changed["autoencoder"]["optimizer"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("autoencoder.loop.setps=3", "did you mean 'autoencoder.loop.steps'"),
        ("autoencoder.steps=3", "did you mean 'autoencoder.loop.steps'"),
        ("autoencoder.loop.steps=-3", "autoencoder.loop.steps"),
        ("autoencoder.loop.steps=many", "autoencoder.loop.steps"),
        ("autoencoder.model.scale=3", "autoencoder.model.scale"),
        ("diffusion.tune.mode=some", "diffusion.tune.mode"),
        ("nonsense", "section.key=value"),
        ("base.name=x", "is a value, not a section"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(DavaeError, match=re.escape(message)) as caught:
        load_recipe("tiny", [override])
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(DavaeError, match="did you mean 'tiny'"):
        load_recipe("tinny")


def test_a_broken_file_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("base: [tiny")
    with pytest.raises(DavaeError, match=r"mine\.yaml is not valid YAML"):
        load_recipe(file)


def test_every_setting_is_read_somewhere():
    """A setting nobody reads is a promise nobody keeps."""
    sources = [
        p.read_text()
        for p in Path(davae.__file__).parent.rglob("*.py")
        if p.name != "settings.py" or p.parent.name != "training"
    ]
    code = "\n".join(sources)
    spread = {"AutoencoderModelSettings", "BaseTransformerArchitecture"}  # passed on as keyword arguments
    unread = []
    for name, model in vars(settings_module).items():
        if isinstance(model, type) and issubclass(model, BaseModel) and model is not Section:
            for field in model.model_fields:
                wanted = rf"\b{field}\b" if name in spread else rf"\.{field}\b"
                if field not in {"kind", "description"} and not re.search(wanted, code):
                    unread.append(f"{name}.{field}")
    assert not unread


def test_a_run_of_an_earlier_version_goes_on_with_settings_that_came_since(tmp_path):
    recipe = load_recipe("debug").model_dump(mode="json")
    older = copy.deepcopy(recipe)
    del older["diffusion"]["loss"]["variance_weight"], older["autoencoder"]["reconstruction"]["kl_weight"]
    with RunDirectory(tmp_path, {**older, "autoencoder_folder": "here"}).locked():
        pass
    default = ReconstructionSettings().kl_weight
    recipe["autoencoder"]["reconstruction"]["kl_weight"] = default
    with RunDirectory(tmp_path, {**recipe, "autoencoder_folder": "here"}).locked():
        pass
    recipe["diffusion"]["loss"]["variance_weight"] = 0.5
    with pytest.raises(DavaeError, match=r"variance_weight: 1\.0 -> 0\.5"):
        RunDirectory(tmp_path, {**recipe, "autoencoder_folder": "here"})


def test_a_run_goes_on_with_latents_read_otherwise(tmp_path):
    """A bundled recipe may keep latents one day, or read them from a cache: what is learnt is the same."""
    older = load_recipe("tiny-base").model_dump(mode="json")
    older["data"] |= {"cache_latents": False, "cache": None}
    with RunDirectory(tmp_path, older).locked():
        pass
    with RunDirectory(tmp_path, load_recipe("tiny-base").model_dump(mode="json")).locked():
        pass


def test_a_run_of_an_earlier_version_with_random_crops_goes_on(tmp_path):
    """It let latents be asked for beside random crops, and kept none."""
    recipe = load_recipe("tiny", ["data.crop=random", "data.cache_latents=false"]).model_dump(mode="json")
    older = copy.deepcopy(recipe)
    older["data"]["cache_latents"] = True
    del older["diffusion"]["loss"]["variance_weight"]  # came since
    with RunDirectory(tmp_path, older).locked():
        pass
    with RunDirectory(tmp_path, recipe).locked():
        pass


def test_a_setting_that_was_taken_away_is_dropped_where_it_said_nothing():
    assert (
        "plain" not in load_recipe("debug", ["diffusion.loop.plain=false"]).model_dump()["diffusion"]["loop"]
    )
    with pytest.raises(DavaeError, match=r"diffusion.loop.*'plain' is gone.*Remove it"):
        load_recipe("debug", ["diffusion.loop.plain=true"])
