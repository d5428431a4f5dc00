"""The README's way with a recipe of a real base: autoencoder, cache, diffusion, without a word about folders."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from davae.cli.main import app
from davae.data import render_scene
from davae.errors import DavaeError
from davae.recipes.read import load_recipe, recipe_names
from davae.recipes.settings import BaseRecipe, UpgradeRecipe
from davae.training.runs.cache import default_folder

CACHED = [
    name
    for name in recipe_names()
    if isinstance(recipe := load_recipe(name), UpgradeRecipe | BaseRecipe) and recipe.data.cache is not None
]


def _davae(*arguments: str) -> str:
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


@pytest.mark.parametrize("name", CACHED)
def test_davae_cache_writes_where_the_recipe_looks(name: str) -> None:
    assert default_folder(name) == Path(load_recipe(name).data.cache)
    assert default_folder(name, ["data.cache=null"]) == Path("caches") / name
    assert default_folder(name, ["data.cache=elsewhere"]) == Path("elsewhere")


def test_the_commands_follow_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each error and each report names the next command, and that command works as it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my photos").mkdir()
    for i in range(6):
        Image.fromarray(render_scene(i, 0, 64)).save(f"my photos/{i}.png")
        Path(f"my photos/{i}.txt").write_text("a scene")
    recipe = load_recipe("debug-text").model_dump(mode="json")
    recipe["data"] |= {"path": "images", "cache": "caches/mine", "cache_latents": False, "hold_out": 2}
    for stage in ("autoencoder", "diffusion"):
        recipe[stage]["loop"] |= {"steps": 1, "batch_size": 2, "validation_images": 2}
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    common = ["--recipe", "mine.yaml", "data.path=my photos"]

    _davae("train", "autoencoder", *common)
    with pytest.raises(DavaeError, match="there is no cache of latents in caches/mine") as refused:
        _davae("train", "diffusion", *common)
    assert "data.cache=null" in str(refused.value)
    command = shlex.split(str(refused.value).split("`")[1])
    assert command == ["davae", "cache", *common]

    message = _davae(*command[1:])
    assert Path("caches/mine/fingerprint.json").is_file()
    command = shlex.split(message.split("`")[1])
    assert command == ["davae", "train", "diffusion", *common]
    _davae(*command[1:])
    assert Path("runs/mine-diffusion/pipeline/model_index.json").is_file()
    assert "shards as they were written: caches/mine" in _davae("cache", "--verify", *common)

    message = _davae("cache", *common, "--out", "other", "--autoencoder", "runs/mine-autoencoder/autoencoder")
    command = shlex.split(message.split("`")[1])
    named = ["--autoencoder", "runs/mine-autoencoder/autoencoder"]
    assert command[3:] == ["--recipe", "mine.yaml", *named, "data.path=my photos", "data.cache=other"]
