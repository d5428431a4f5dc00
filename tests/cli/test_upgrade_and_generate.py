"""``davae upgrade`` and ``davae generate`` for text-to-image pipelines."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from davae.bases.debug_pipelines import SMALL_PIPELINES, small_pipeline
from davae.cli.main import main
from davae.models import AutoencoderDA
from davae.pipelines.sampling.generate import generate_images


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object):
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
def autoencoder(tmp_path: Path) -> Path:
    vae = AutoencoderDA.from_base(small_pipeline("sd3").vae, scale=2, detail_channels=8)
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def test_upgrade_reports_and_generate_reads_prompts(autoencoder, monkeypatch, capsys, tmp_path) -> None:
    out = tmp_path / "upgraded"
    arguments = ("upgrade", "debug-sd3", "--autoencoder", autoencoder, "--out", out)
    status, message, _ = run(monkeypatch, capsys, *arguments, "--timestep-shift", "2.5")
    assert status == 0
    assert "warm start verified: base outputs differ by" in message
    assert "StableDiffusion3Pipeline with 4 + 8 latent channels, images 2 times larger" in message
    assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["shift"] == 2.5

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two of them\na red fox in snow\n\nein Haus am See, früh\n", encoding="utf-8")
    images = tmp_path / "images"
    further = ("--count", 2, "--seed", 5, "--steps", 1, "--height", 64, "--width", 128, "--negative", "a car")
    arguments = ("generate", out, "--prompts", prompts, "--prompt", "a cat", "--out", images, *further)
    status, message, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "6 images of 128 x 64 pixels" in message
    names = {path.name for path in images.glob("*.png")}
    assert names == {
        *("a-cat-5.png", "a-cat-6.png", "a-red-fox-in-snow-7.png", "a-red-fox-in-snow-8.png"),
        *("ein-haus-am-see-früh-8f25f0e50dbd-9.png", "ein-haus-am-see-früh-8f25f0e50dbd-10.png"),
    }
    assert {Image.open(images / name).size for name in names} == {(128, 64)}


def test_a_prompt_that_is_not_utf8_is_read_with_a_sign_for_it(monkeypatch, capsys, tmp_path) -> None:
    prompt = "caf\udce9"  # as an argument in Latin-1 reaches Python
    arguments = ("generate", "debug-sd3", "--prompt", prompt, "--negative", prompt, "--out", tmp_path, "--steps", 1)
    status, message, problem = run(monkeypatch, capsys, *arguments)
    assert (status, problem) == (0, "")
    assert message.startswith("1 image of")


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_every_small_pipeline_can_be_upgraded(name, monkeypatch, capsys, tmp_path) -> None:
    vae = AutoencoderDA.from_base(small_pipeline(name).vae, scale=2, detail_channels=8)
    vae.save_pretrained(tmp_path / "vae")
    arguments = ("upgrade", f"debug-{name}", "--autoencoder", tmp_path / "vae", "--out", tmp_path / "up")
    status, message, problem = run(monkeypatch, capsys, *arguments)
    assert (status, problem.count("leaks")) == (0, 0)
    assert "warm start verified" in message
    assert (tmp_path / "up" / "model_index.json").is_file()


def test_upgrade_as_json(autoencoder, monkeypatch, capsys, tmp_path) -> None:
    arguments = ("upgrade", "debug-sd3", "--autoencoder", autoencoder, "--out", tmp_path / "up", "--json")
    status, message, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    facts = json.loads(message)
    assert facts["channels"] == {"base": 4, "detail": 8}
    assert facts["pixels_per_latent_position"] == 8
    assert facts["self_check"]["max_detail_output"] == 0
    assert facts["scheduler"]["shift"] == 3.0


def test_the_shipped_upgrade_is_at_hand_by_its_name(monkeypatch, capsys, tmp_path) -> None:
    """Nothing is trained or downloaded; the images are of twice the base's side."""
    for name, side in (("tiny", 64), ("tiny-upgraded", 128)):
        status, message, _ = run(
            monkeypatch, capsys, "generate", name, "lighthouse", "--steps", "2", "--out", tmp_path / name
        )
        assert status == 0
        assert f"1 image of {side} x {side} pixels" in message
    picture = tmp_path / "rows.png"
    arguments = ("reconstruct", "tiny-upgraded", "procedural:4", "--count", "2", "--out", picture)
    status, message, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert float(re.search(r"([+-][0-9.]+) dB over the base, enlarged", message)[1]) > 1.5
    assert picture.is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "debug-sd3", "cat"], "makes images of prompts: give --prompt"),
        (["generate", "debug-sd3"], "makes images of prompts: give --prompt"),
        (["generate", "debug-dit", "--prompt", "cat"], "makes images of classes: give names or numbers of class 0, "),
        (["generate", "tiny"], "makes images of classes: give names or numbers of balloon, basket, book, "),
        (["generate", "debug-dit", "cat"], "has no class 'cat'"),
        (["generate", "debug-dit", "1001"], "class 1001 is out of range: the model knows 0 to 999"),
        (["generate", "debug", "99"], "class label 99 is out of range"),
        (["generate", "debug-dit", "7", "--height", "64"], "DiTPipeline has no option height"),
        (["generate", "debug-sd3", "--prompts", "absent.txt"], "cannot read the prompts in absent.txt"),
        (["generate", "debug-sd3", "--prompt", "cat", "--count", "0"], "greater than or equal to 1"),
        (["generate", "debug-sd3", "--prompt", "cat", "--guidance", "-1"], "greater than or equal to 0"),
        (
            ["generate", "debug-sd3", "--prompt", "cat", "--guidance", "nan"],
            "greater than or equal to 0",
        ),
        (
            ["upgrade", "debug-sd3", "--timestep-shift", "big"],
            "must be 'base', 'native' or a number, not 'big'",
        ),
    ],
)
def test_mistakes(arguments, words, autoencoder, monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    if arguments[0] == "upgrade":
        arguments = [*arguments, "--autoencoder", autoencoder, "--out", "up"]
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert words in err


@pytest.mark.parametrize("name", ["flux", "qwenimage", "dit"])
def test_generate_by_library(name: str) -> None:
    """Seeds give the same images as the pipeline itself, and guidance reaches the one that the pipeline has."""
    pipe = small_pipeline(name)
    sizes = {} if name == "dit" else {"height": 32, "width": 32}
    made = [next(generate_images(pipe, ["7"], seed=3, steps=2, guidance=scale, **sizes)) for scale in (1.0, 6.0)]
    assert made[0].image.tobytes() != made[1].image.tobytes()
    subject = {"class_labels": [7]} if name == "dit" else {"prompt": "7"}
    own = {"true_cfg_scale": 6.0, "negative_prompt": " "} if name == "qwenimage" else {"guidance_scale": 6.0}
    generator = torch.Generator().manual_seed(3)
    expected = pipe(**subject, **sizes, **own, num_inference_steps=2, generator=generator).images[0]
    assert made[1].image.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", ["sana", "pixart-sigma"])
def test_sizes_are_those_asked_for_where_the_pipeline_would_choose_its_own(name) -> None:
    pipe = small_pipeline(name)  # of a sample size for which diffusers has no list of sizes
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        made = next(generate_images(pipe, ["a cat"], steps=1, height=64, width=128))
    assert made.image.size == (128, 64)


def test_an_upgrade_without_details_is_the_base_with_an_upscaling_decoder(
    autoencoder, monkeypatch, capsys, tmp_path
) -> None:
    out = tmp_path / "up"
    arguments = ("upgrade", "debug-sd3", "--autoencoder", autoencoder, "--details", "none", "--out", out)
    status, message, _ = run(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "StableDiffusion3Pipeline with its own 4 latent channels and transformer, decoded 2 times larger" in message
    found = load_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    wanted = small_pipeline("sd3").transformer.state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    arguments = ("generate", out, "--prompt", "a cat", "--out", tmp_path / "made", "--steps", 1)
    status, message, _ = run(monkeypatch, capsys, *arguments, "--height", 64, "--width", 64)
    assert status == 0
    assert "1 image of 64 x 64 pixels" in message
