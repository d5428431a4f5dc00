"""Recipes: typed, strict, read without torch; what a run may continue with."""

import copy
import functools
import operator
import re
import subprocess
import sys

import pytest
import yaml

from davae.errors import DavaeError
from davae.recipes.read import (
    KINDS,
    differing_keys,
    dump_recipe,
    flatten,
    load_ablation,
    load_recipe,
    load_variant,
    parse_recipe,
    recipe_names,
    resumable_keys,
    sections_of,
)
from davae.recipes.settings import ReconstructionSettings
from davae.training.checkpoints.run_directory import RunDirectory


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
        "autoencoder.optimizer.lr_warmup_steps",  # a share of the steps
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
        ("diffusion.tune.mode=lorra", "(did you mean 'lora'?)"),
        ("autoencoder.loop.report_to=[wanb]", "'autoencoder.loop.report_to' is 'wanb': it must be 'tensorboard'"),
        ("nonsense", "section.key=value"),
        ("taesd3-photos", "did you mean --recipe taesd3-photos?"),
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


#: Last parts of the names of the settings with which a run may continue changed, in any section of any recipe
#: (a table of noise levels has ``steps`` of another kind).
RESUMABLE = {
    "steps",
    "learning_rate",
    "new_channels_learning_rate",
    "betas",
    "weight_decay",
    "decay_only_matrices",
    "eps",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_end",
    "lr_num_cycles",
    "lr_power",
    "lr_step_rules",
    "detail_warmup_steps",
    "tracker_project_name",
    "tracker_run_name",
    "offload_ema",
    "max_grad_norm",
    "skip_grad_norm",
    "max_skipped_steps",
    "channels_last",
    "compile",
    "validate_every",
    "validate_at_start",
    "validation_images",
    "validation",
    "best_metric",
    "best_mode",
    "num_inference_steps",
    "guidance_scale",
    "guidance_interval",
    "statistics_images",
    "scaling_images",
    "description",
    "base_remote_code",
    "save_dtype",
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
    "offload_blocks",
    "precision",
    "workers",
    "timeout_s",
    "cache",
    "cache_dtype",
    "cache_latents",
    "log_every",
    "checkpoint_every",
    "checkpoints_total_limit",
    "report_to",
}


@pytest.mark.parametrize("name", ["debug-text", "imagenet-512-native", "tiny-base", "dc-ae-f64c128", "sd-vae-f64"])
def test_a_run_continues_with_other_values_of_the_resumable_settings_alone(name, tmp_path):
    ours = load_recipe(name).model_dump(mode="json")
    keys = list(_leaves(ours))
    resumable = {key for key in keys if _may_change(key)}
    assert resumable_keys(ours["kind"]) & set(keys) == resumable
    assert any("batch_size" in key for key in resumable)
    theirs = copy.deepcopy(ours)
    for key in resumable:
        *path, last = key.split(".")
        functools.reduce(operator.getitem, path, theirs)[last] = "other"
    RunDirectory(tmp_path, theirs).begin()
    RunDirectory(tmp_path, ours).begin()
    other = next(key for key in keys if key.endswith("loop.seed"))
    *path, last = other.split(".")
    functools.reduce(operator.getitem, path, theirs)[last] = 77
    with pytest.raises(DavaeError, match=rf"{re.escape(other)}: 0 -> 77"):
        RunDirectory(tmp_path, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_resumable_settings_are_these(kind):
    names = {f"{path}.{name}".lstrip(".") for path, s in sections_of(KINDS[kind]) for name in s.model_fields}
    assert resumable_keys(kind) == {name for name in names if _may_change(name)}


def _may_change(key):
    return key.rpartition(".")[2] in RESUMABLE and ".table." not in key


def _leaves(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_reading_recipes_imports_nothing_heavy():
    """A mistyped key is answered at once."""
    code = """
import sys
import davae.recipes.presets
from davae.recipes.read import load_recipe
load_recipe("tiny")
print(sorted({m.partition(".")[0] for m in sys.modules} & {"torch", "diffusers", "transformers", "numpy"}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_of_an_earlier_version_goes_on_with_settings_that_came_since(tmp_path):
    recipe = load_recipe("debug").model_dump(mode="json")
    older = copy.deepcopy(recipe)
    del older["diffusion"]["loss"]["variance_weight"], older["autoencoder"]["reconstruction"]["kl_weight"]
    RunDirectory(tmp_path, {**older, "autoencoder_folder": "here"}).begin()
    default = ReconstructionSettings().kl_weight
    recipe["autoencoder"]["reconstruction"]["kl_weight"] = default
    RunDirectory(tmp_path, {**recipe, "autoencoder_folder": "here"}).begin()
    recipe["diffusion"]["loss"]["variance_weight"] = 0.5
    with pytest.raises(DavaeError, match=r"variance_weight: 1\.0 -> 0\.5"):
        RunDirectory(tmp_path, {**recipe, "autoencoder_folder": "here"})


def test_a_run_goes_on_with_latents_read_otherwise(tmp_path):
    """A bundled recipe may keep latents one day, or read them from a cache: what is learnt is the same."""
    older = load_recipe("tiny-base").model_dump(mode="json")
    older["data"] |= {"cache_latents": False, "cache": None}
    RunDirectory(tmp_path, older).begin()
    RunDirectory(tmp_path, load_recipe("tiny-base").model_dump(mode="json")).begin()


def test_a_run_of_an_earlier_version_with_random_crops_goes_on(tmp_path):
    """It let latents be asked for beside random crops, and kept none."""
    recipe = load_recipe("tiny", ["data.crop=random", "data.cache_latents=false"]).model_dump(mode="json")
    older = copy.deepcopy(recipe)
    older["data"]["cache_latents"] = True
    del older["diffusion"]["loss"]["variance_weight"]  # came since
    RunDirectory(tmp_path, older).begin()
    RunDirectory(tmp_path, recipe).begin()


def test_a_setting_that_was_taken_away_is_dropped_where_it_said_nothing():
    assert "plain" not in load_recipe("debug", ["diffusion.loop.plain=false"]).model_dump()["diffusion"]["loop"]
    with pytest.raises(DavaeError, match=r"diffusion.loop.*'plain' is gone.*Remove it"):
        load_recipe("debug", ["diffusion.loop.plain=true"])


def test_an_ablation_takes_overrides_of_every_variant():
    recipe = load_ablation("ablation-debug", ["seeds=[4]", "data.resolution=64", "base=tiny"])
    assert recipe.seeds == (4,)
    assert recipe.overrides[-2:] == ("data.resolution=64", "base=tiny")
    for name in recipe.variants:
        variant = load_variant(recipe, name, 4)
        assert (variant.data.resolution, variant.base, variant.autoencoder.loop.steps) == (64, "tiny", 2)
    with pytest.raises(DavaeError, match=r"recipe 'debug': unknown key 'data.sise'"):
        load_ablation("ablation-debug", ["data.sise=64"])
    with pytest.raises(DavaeError, match=r"recipe 'ablation-debug': unknown key 'seedz'; did you mean 'seeds'"):
        load_ablation("ablation-debug", ["seedz=[4]"])


def test_nested_settings_become_dotted_rows():
    assert flatten({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == [("a.b", 1), ("a.c.d", 2), ("e", 3)]
