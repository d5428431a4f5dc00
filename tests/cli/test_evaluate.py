"""``davae evaluate``: tables, JSON, parts that are missing, and mistakes."""

import hashlib
import json

import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model
from typer.testing import CliRunner

from davae.bases.tiny import debug_base
from davae.cli.main import app
from davae.errors import DavaeError
from davae.models import AutoencoderDA


@pytest.fixture
def autoencoder(tmp_path):
    torch.manual_seed(0)
    AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def _run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["evaluate", *map(str, arguments)])


def test_reconstruction_tells_every_baseline_and_what_is_missing(autoencoder, tmp_path):
    (tmp_path / "crops").mkdir()
    Image.new("RGB", (21, 40), "red").save(tmp_path / "crops" / "a.png")
    boxes = "file,name,left,top,right,bottom\ncrops/a.png,lettering,2,3,12,9\ncrops/a.png,faces,0,0,21,40\n"
    (tmp_path / "boxes.csv").write_text(boxes)
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16}
    Dinov2Model(Dinov2Config(**size, patch_size=8)).save_pretrained(tmp_path / "dino")
    done = _run(
        "reconstruction", autoencoder, "--data", "procedural:8", "--resolution", 32, "--images", 5,
        "--crops", f"lettering={tmp_path / 'crops'}", "--lpips", tmp_path / "vgg.pth",
        "--boxes", tmp_path / "boxes.csv", "--dino", tmp_path / "dino",
        "--json", tmp_path / "r.json", "--device", "cpu",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for words in (
        "decoder alone: its joint decoder",
        "base, enlarged",
        "base, native",
        "seconds to decode",
        "lettering: psnr",
        "swd/finest",
        "spectrum_db",
    ):
        assert words in done.output
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["images"] == 5
    assert found["crops"] == {"fine texture": 5, "lettering": 2, "faces": 1}
    assert found["rows"]["base, enlarged"]["crops"]["faces"]["dino"] > 0
    assert len(found["perceptual"]["dino"]["weights_sha256"]) == 64
    assert len(found["reference"]["pixels_sha256"]) == 64
    assert "lpips" in found["unavailable"]
    assert found["rows"]["upgraded"]["figures"]["psnr"] > 0


def test_weights_are_used_as_saved_unless_another_precision_is_asked_for(autoencoder, tmp_path):
    """By every verb that measures an autoencoder in a folder; bfloat16 changes the figures a little."""
    half, data = tmp_path / "half", ["--data", "procedural:8", "--resolution", "32", "--device", "cpu"]
    AutoencoderDA.from_pretrained(autoencoder).to(torch.bfloat16).save_pretrained(half)
    verbs = {
        "evaluate reconstruction": [half, "--images", 2, "--json", tmp_path / "r.json"],
        "compare autoencoder": [f"a={half}", "--images", 2, "--repeats", 1, "--json", tmp_path / "r.json"],
        "inspect": [half, "--images", 8, "--method", "pca", "--out", tmp_path / "out"],
    }
    figures = {
        "evaluate reconstruction": lambda: _json(tmp_path / "r.json", "rows", "upgraded", "figures", "psnr"),
        "compare autoencoder": lambda: _json(tmp_path / "r.json", "autoencoders", 0, "figures", "psnr"),
        "inspect": lambda: _json(tmp_path / "out" / "inspection.json", "half", "psnr", "whole"),
    }
    for verb, words in verbs.items():
        found = {}
        for dtype in (None, "bfloat16", "float32"):
            asked = [*verb.split(), *words, *data, *(["--dtype", dtype] if dtype else [])]
            done = CliRunner().invoke(app, [str(word) for word in asked], catch_exceptions=False)
            assert done.exit_code == 0, done.output
            found[dtype] = figures[verb]()
        assert found[None] == found["bfloat16"] != found["float32"], verb
        assert found["float32"] == pytest.approx(found["bfloat16"], rel=0.01)
        done = CliRunner().invoke(app, [str(word) for word in [*verb.split(), *words, *data, "--dtype", "half"]])
        assert "dtype must be float32, bfloat16, float16, not 'half' (--dtype)" in str(done.exception)
    assert _json(tmp_path / "r.json", "autoencoders", 0, "dtype") == "float32"


def _json(file, *keys):
    found = json.loads(file.read_text())
    for key in keys:
        found = found[key]
    return found


def test_generation_measures_what_it_can_and_continues(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    arguments = [
        "generation", "debug", "--reference", "procedural:12", "--count", 6, "--steps", 1, "--guidance", 1,
        "--batch", 2, "--out", tmp_path / "out", "--device", "cpu",
    ]  # fmt: skip
    done = _run(*arguments)
    assert done.exit_code == 0, done.output
    assert "weights-inception-2015-12-05-6726825d.pth" in done.output
    first = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert first["rows"]["upgraded"]["figures"]["swd/mean"] > 0
    assert "efficientnet-lite0" in first["rows"]["upgraded"]["unavailable"]["fid/inception"]
    assert first["reference"]["images"] == 12
    changed = (tmp_path / "out" / "upgraded" / "images" / "0000003.png").stat().st_mtime_ns
    assert _run(*arguments).exit_code == 0
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == first
    assert (tmp_path / "out" / "upgraded" / "images" / "0000003.png").stat().st_mtime_ns == changed


def test_statistics_are_saved_and_serve_as_the_reference(tmp_path):
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16}
    Dinov2Model(Dinov2Config(**size, patch_size=8)).save_pretrained(tmp_path / "dino")
    network_name = str(tmp_path / "dino")
    common = ["--count", 4, "--steps", 1, "--guidance", 1, "--out", tmp_path / "out", "--device", "cpu"]
    common += ["--features", network_name]
    saved = tmp_path / "real.npz"
    one = _run("generation", "debug", "--reference", "procedural:6", *common, "--save-statistics", saved)
    assert one.exit_code == 0, one.output
    first = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert first["reference"]["saved"]["sha256"] == hashlib.sha256(saved.read_bytes()).hexdigest()
    assert _run("generation", "debug", "--reference", saved, *common).exit_code == 0
    second = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert second["reference"]["sha256"] == first["reference"]["saved"]["sha256"]
    name = f"fid/{network_name}"
    figures = [message["rows"]["upgraded"]["figures"][name] for message in (first, second)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)
    (network,) = second["networks"]
    assert "16 x 16" in network["resize"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generation", "debug", "--reference", "absent.npz"], "absent.npz"),
        (["generation", "debug", "--reference", "procedural:4", "--count", "1"], "at least 2 images"),
        (["generation", "debug", "--reference", "procedural:4", "--dtype", "int8"], "--dtype"),
        (["generation", "debug", "--reference", "procedural:4", "--prompts", "p.txt"], "leave --prompts out"),
        (["generation", "debug", "--reference", "procedural:4", "--upscaler", "x=a.pth"], "a.pth is a pickle"),
        (["reconstruction", "absent", "--data", "procedural:4"], "no autoencoder in absent"),
    ],
)
def test_mistakes_are_named(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = _run(*arguments)
    assert isinstance(done.exception, DavaeError)
    assert words in str(done.exception)
