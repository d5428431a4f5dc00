"""The command line: what it prints, and how it ends."""

import json
import sys

import pytest
import yaml
from PIL import Image
from tests.pipelines.parts import upgraded

from davae.bases.generate import offload_weights
from davae.bases.tiny import debug_base
from davae.cli.main import main
from davae.data import render_scene
from davae.models import AutoencoderDA
from davae.recipes.read import load_recipe


def _run(monkeypatch, capsys, *arguments):
    """Exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["davae", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "500")
    try:
        main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.fixture
def autoencoder(tmp_path):
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "autoencoder", "--recipe", "tinny"], "did you mean 'tiny'"),
        (["train", "autoencoder", "--recipe", "debug", "data.path=/nowhere/at-all"], "/nowhere/at-all"),
        (["train", "autoencoder", "--recipe", "debug", "autoencoder.loop.step=1"], "autoencoder.loop.steps"),
        (["train", "diffusion", "--recipe", "debug", "--autoencoder", "absent"], "davae train autoencoder"),
        (["train", "base", "--recipe", "tiny"], "kind: base"),
        (["train", "autoencoder", "--recipe", "tiny-base"], "davae train base"),
        (["report", "absent"], "absent"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, err = _run(monkeypatch, capsys, *arguments)
    assert status == 2
    line = [text for text in err.splitlines() if text.startswith("davae: ")]
    assert len(line) == 1
    assert words in line[0]


def test_dry_run_prints_the_resolved_recipe_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "autoencoder", "--recipe", "debug", "--dry-run", "autoencoder.loop.steps=3"]
    status, out, _ = _run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert yaml.safe_load(out)["autoencoder"]["loop"]["steps"] == 3
    assert not list(tmp_path.iterdir())


def test_doctor_tells_versions_as_json(monkeypatch, capsys):
    status, out, _ = _run(monkeypatch, capsys, "doctor", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["packages"]["torch"].startswith("2.")
    assert set(facts["optional"]) >= {"lpips", "torchvision"}


def test_upgrade_then_generate_at_twice_the_size(autoencoder, monkeypatch, capsys, tmp_path):
    out = tmp_path / "upgraded"
    assert _run(monkeypatch, capsys, "upgrade", "debug", "--autoencoder", autoencoder, "--out", out)[0] == 0
    arguments = ["generate", out, "tree", "3", "--out", tmp_path / "images", "--steps", "2"]
    assert _run(monkeypatch, capsys, *arguments)[0] == 0
    found = sorted((tmp_path / "images").glob("*.png"))
    assert [p.name for p in found] == ["3-1.png", "tree-0.png"]
    assert {Image.open(p).size for p in found} == {(32, 32)}


def test_weights_rest_in_main_memory_only_where_there_is_a_gpu(monkeypatch, capsys, tmp_path):
    arguments = ["generate", "debug", "3", "--out", tmp_path / "images", "--device", "cpu", "--offload", "model"]
    status, _, err = _run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert "here is none, leave it out" in err


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloaded_weights_are_put_in_the_hands_of_diffusers_and_images_are_decoded_in_tiles(offload, monkeypatch):
    """Without a GPU: the calls alone."""
    pipe, called = upgraded(debug_base()), []
    for name in ("model", "sequential"):
        monkeypatch.setattr(pipe, f"enable_{name}_cpu_offload", lambda device, name=name: called.append((name, device)))
    offload_weights(pipe, offload, "cuda:1")
    assert called == [(offload, "cuda:1")]
    assert pipe.vae.use_tiling
    assert pipe.vae.use_slicing


def test_recipes_are_listed_shown_copied_and_made(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "class-conditional" in _run(monkeypatch, capsys, "recipes", "list")[1].lower()
    assert "# " in _run(monkeypatch, capsys, "recipes", "show", "tiny")[1]
    assert _run(monkeypatch, capsys, "recipes", "copy", "tiny", "mine")[:2] == (0, "mine.yaml\n")
    assert load_recipe("mine.yaml") == load_recipe("tiny")
    assert _run(monkeypatch, capsys, "recipes", "copy", "tiny", "mine.yaml")[0] == 2
    assert _run(monkeypatch, capsys, "recipes", "new", "tiny", "new.yaml", "--steps", "20")[0] == 0
    assert load_recipe("new.yaml").diffusion.loop.steps == 20


def test_a_class_that_does_not_exist_is_named(monkeypatch, capsys, tmp_path):
    status, _, err = _run(monkeypatch, capsys, "generate", "debug", "lighthose", "--out", tmp_path / "images")
    assert status == 2
    assert "lighthouse" in err


def test_reconstruct_writes_the_picture_and_the_gain(autoencoder, monkeypatch, capsys, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(3):
        Image.fromarray(render_scene(i, 0, 48)).save(photos / f"{i}.png")
    picture = tmp_path / "rows.png"
    arguments = ["reconstruct", autoencoder, photos, "--resolution", "32", "--out", picture]
    status, out, _ = _run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "dB over the base, enlarged; decoder alone " in out
    assert Image.open(picture).size == (3 * 34, 4 * 34)
