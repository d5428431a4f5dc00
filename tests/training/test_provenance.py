"""Bases from the hub: pinned, written down, and never allowed to run code of their own unasked."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from davae.bases import open as bases
from davae.bases.open import load_base, load_recipe_autoencoder
from davae.bases.tiny import debug_base
from davae.data import Mirrored, open_dataset
from davae.data.in_memory import ImagesInMemory
from davae.errors import DavaeError
from davae.recipes.presets import find_preset
from davae.recipes.read import load_recipe
from davae.training import data as images_of_recipes
from davae.training.checkpoints.run_directory import base_facts, commit_of, data_facts
from davae.training.runs.train import run_autoencoder, run_diffusion, train_autoencoder, train_diffusion

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub's cache without a hub: of a pipeline ``a/b`` only what stage 1 needs, as v1.0 and main; its folder."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--a--b" / "snapshots" / COMMIT
    debug_base().save_pretrained(snapshot)
    for part in ("transformer", "scheduler"):
        shutil.rmtree(snapshot / part)
    for name in ("v1.0", "main"):
        (cache / "models--a--b" / "refs").mkdir(exist_ok=True)
        (cache / "models--a--b" / "refs" / name).write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def _recipe(*overrides):
    loop = ["steps=1", "log_every=1", "validation_images=2"]
    data = ["data.path=procedural:8", "data.hold_out=2"]
    return load_recipe("debug", [*data, *(f"autoencoder.loop.{o}" for o in loop), *overrides])


def test_the_recipe_pins_and_the_run_writes_down_the_commit(hub, tmp_path):
    train_autoencoder(_recipe("base=a/b", "base_revision=v1.0"), tmp_path / "run")
    said = json.loads((tmp_path / "run" / "environment.json").read_text())["base"]
    assert said == {"name": "a/b", "revision": "v1.0", "commit": COMMIT}


def test_a_run_goes_on_with_another_revision_of_the_same_weights_alone(hub, tmp_path, caplog):
    run = tmp_path / "run"
    train_autoencoder(_recipe("base=a/b", f"base_revision={COMMIT}"), run)
    with caplog.at_level("INFO", logger="davae"):
        train_autoencoder(_recipe("base=a/b", "base_revision=main"), run)
    assert f"goes on with base_revision: {COMMIT} -> main" in caplog.text
    weights = hub / "vae" / "diffusion_pytorch_model.safetensors"
    other = load_file(weights)
    other["decoder.conv_out.bias"] += 1
    save_file(other, weights, metadata={"format": "pt"})
    with pytest.raises(DavaeError, match="the base autoencoder: other weights"):
        train_autoencoder(_recipe("base=a/b", "base_revision=main"), run)


def test_an_autoencoder_on_the_hub_or_in_a_folder_is_a_base_for_stage_1(hub, tmp_path):
    whole = train_autoencoder(_recipe("base=a/b"), tmp_path / "whole")
    for file in (hub / "vae").iterdir():
        file.rename(hub / file.name)
    (hub / "model_index.json").unlink()
    for number, base in enumerate(("a/b", str(hub))):
        alone = train_autoencoder(_recipe(f"base={base}"), tmp_path / f"alone{number}")
        assert alone.metrics == whole.metrics
    assert "4 base and" in run_autoencoder("debug", [f"base={hub}"], dry_run=True)
    with pytest.raises(DavaeError, match="an autoencoder by itself"):
        run_diffusion("debug", [f"base={hub}"], dry_run=True)


def test_stage_1_knows_a_bundled_configuration_by_its_short_name(hub, tmp_path, monkeypatch):
    """As everything else that opens a base does."""
    preset = dataclasses.replace(find_preset("sd35-medium"), name="a/b")
    monkeypatch.setattr(bases, "find_preset", lambda name: preset if name == "short" else None)
    found = load_recipe_autoencoder(_recipe("base=short"))
    expected = debug_base().vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())
    with pytest.raises(DavaeError, match=r"base_revision is set, but .* is a folder"):
        load_recipe_autoencoder(_recipe(f"base={hub}", "base_revision=main"))


def test_the_embedded_base_has_a_name_only():
    said = base_facts(_recipe(), *load_base("debug").components.values())["base"]
    assert said == {"name": "debug", "revision": None, "commit": None}


def test_the_images_are_pinned_and_written_down_too(tmp_path, monkeypatch):
    """A data set from the hub is asked for at the recipe's revision; the run says which commit that was."""
    asked = []

    def from_hub(name, **options):
        asked.append((name, options["revision"]))
        images = open_dataset("procedural:8", resolution=options["resolution"], hold_out=2, part=options["part"])
        images.commit = COMMIT
        return images

    monkeypatch.setattr(images_of_recipes, "open_dataset", from_hub)
    recipe = _recipe("data.path=someone/photos", "data.revision=v3", "diffusion.loop.steps=1")
    result = train_autoencoder(recipe, tmp_path / "1")
    train_diffusion(recipe, tmp_path / "2", result.result)
    assert set(asked) == {("someone/photos", "v3")}
    for run_folder in ("1", "2"):
        said = json.loads((tmp_path / run_folder / "environment.json").read_text())["data"]
        assert said == {"name": "someone/photos", "revision": "v3", "commit": COMMIT}
    images = open_dataset("procedural:8", resolution=32)
    images.commit = COMMIT
    assert data_facts(recipe.data, Mirrored(ImagesInMemory(images)))["data"]["commit"] == COMMIT


def test_commits_are_found_in_tokenizers_too_and_only_in_the_cache():
    tokenizer = SimpleNamespace(name_or_path=f"C:\\cache\\models--a--b\\snapshots\\{COMMIT}\\tokenizer")
    assert commit_of([None, tokenizer]) == COMMIT
    assert commit_of([SimpleNamespace(config=SimpleNamespace(_name_or_path="/models/sd3"))]) is None


def _brings_code(folder: Path, marker: Path) -> Path:
    """The debug base as a pipeline whose class is defined by a file beside it."""
    debug_base().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["brought", "BroughtPipeline"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "brought.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from davae.pipelines import ClassConditionalPipeline\n"
        "class BroughtPipeline(ClassConditionalPipeline):\n    pass\n"
    )
    return folder


def test_code_beside_the_weights_runs_only_where_the_recipe_says_so(tmp_path):
    marker = tmp_path / "it-ran"
    folder = _brings_code(tmp_path / "base", marker)
    with pytest.raises(DavaeError, match="base_remote_code: true in the recipe"):
        load_base(str(folder), remote_code=False)
    with pytest.raises(DavaeError, match="in Python with trust_remote_code=True"):
        load_base(str(folder))
    assert not marker.exists()
    load_base(str(folder), remote_code=True)
    assert marker.exists()


def test_a_folder_has_no_revision(tmp_path):
    debug_base().save_pretrained(tmp_path / "base")
    with pytest.raises(DavaeError, match="revisions are of names on the hub"):
        load_base(str(tmp_path / "base"), revision="main")


def test_pickled_weights_of_a_base_are_refused_with_the_way_to_convert_them(tmp_path):
    debug_base().save_pretrained(tmp_path / "base", safe_serialization=False)
    assert not list((tmp_path / "base").rglob("*.safetensors"))
    with pytest.raises(DavaeError, match=r"not safetensors but pickles.*save_pretrained\('FOLDER'\)"):
        load_base(str(tmp_path / "base"))
