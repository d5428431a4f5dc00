"""What a verb does is a public function: called from Python with the same arguments it gives what the verb gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tests.interop.test_official_lightningdit import official
from typer.testing import CliRunner

from davae.bases.generate import write_images
from davae.bases.tiny import debug_base
from davae.bases.upgrade import write_upgraded
from davae.benchmark.autoencoder import bench_autoencoder
from davae.benchmark.training import StageName, bench_training
from davae.cli import bench, cache, convert, export, inspect
from davae.cli.main import app
from davae.data import render_scene
from davae.data.cache import Format
from davae.evaluation.generation.evaluate import evaluate_generation
from davae.evaluation.latent_space.inspect import inspect_latents
from davae.evaluation.latent_space.projection import Method
from davae.evaluation.reconstruction.evaluate import evaluate_reconstruction
from davae.experiments.compare import compare_autoencoders
from davae.interop.conversion import Which, convert_lightningdit_file
from davae.interop.official_sd3_transformer import ChannelOrder
from davae.models import AutoencoderDA
from davae.planner.recipes import plan_upgrade
from davae.recipes.read import load_ablation
from davae.report.ablation import run_ablation
from davae.report.inspection import write_inspection
from davae.training.checkpoints.run_directory import installation, installation_text
from davae.training.dc_ae.train import run_dc_ae
from davae.training.runs.cache import run_cache
from davae.training.runs.export import Format as ExportFormat
from davae.training.runs.export import export_run
from davae.training.runs.reconstruct import reconstruct_images
from davae.training.runs.train import run_autoencoder, run_base, run_diffusion


def verb(*arguments: object) -> str:
    """Standard output of a verb."""
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def untimed(value: Any) -> Any:
    """A result without what differs between two measurements of the same."""
    if isinstance(value, list):
        return [untimed(v) for v in value]
    if isinstance(value, dict):
        timed = ("second", "speed", "over_base", "memory")
        return {k: untimed(v) for k, v in value.items() if not any(word in k for word in timed)}
    return value


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a debug autoencoder and photographs."""
    folder = tmp_path_factory.mktemp("here")
    torch.manual_seed(0)
    AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8).save_pretrained(folder / "vae")
    (folder / "photos").mkdir()
    for i in range(3):
        Image.fromarray(render_scene(i, 0, 48)).save(folder / "photos" / f"{i}.png")
    return folder


def test_plan(tmp_path: Path) -> None:
    verb("plan", "debug", "--resolution", 64, "--batch", 2, "--json", tmp_path / "plan.json")
    plan = plan_upgrade("debug", resolution=64, scale=2, batch=2)
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(plan.to_json()))


def test_upgrade_and_generate(here: Path, tmp_path: Path) -> None:
    text = verb("upgrade", "debug", "--autoencoder", here / "vae", "--out", tmp_path / "a", "--json")
    written = write_upgraded("debug", here / "vae", tmp_path / "b")
    assert json.loads(text) | {"folder": None} == json.loads(json.dumps(written.to_json())) | {"folder": None}
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    message = verb("upgrade", "debug", "--autoencoder", here / "vae", "--out", tmp_path / "c").strip()
    assert message.removesuffix("c") == str(written).removesuffix("b")

    options = ["--seed", 3, "--count", 2, "--steps", 2]
    text = verb("generate", tmp_path / "a", "tree", "book", *options, "--out", tmp_path / "x")
    images = write_images(str(tmp_path / "b"), ["tree", "book"], seed=3, count=2, steps=2, out=tmp_path / "y")
    assert text.strip() == f"4 images of {images.width} x {images.height} pixels in {tmp_path / 'x'}"
    assert [p.name for p in images.files] == ["tree-3.png", "tree-4.png", "book-5.png", "book-6.png"]
    assert contents(tmp_path / "x") == contents(tmp_path / "y")


def test_reconstruct(here: Path, tmp_path: Path) -> None:
    options = ["--resolution", 32, "--count", 2, "--out", tmp_path / "a.png"]
    text = verb("reconstruct", here / "vae", here / "photos", *options)
    result = reconstruct_images(here / "vae", str(here / "photos"), resolution=32, count=2, out=tmp_path / "b.png")
    assert text == f"{result}\n".replace("b.png", "a.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_train_cache_and_export(tmp_path: Path) -> None:
    settings = ["autoencoder.loop.steps=1", "diffusion.loop.steps=1"]
    a, b = tmp_path / "a", tmp_path / "b"
    common = ["--recipe", "debug", *settings]
    text = verb("train", "autoencoder", *common, "--out", a)
    assert text.replace(str(a), str(b)) == run_autoencoder("debug", settings, b) + "\n"
    assert contents(a / "autoencoder") == contents(b / "autoencoder")
    text = verb("cache", *common, "--autoencoder", a / "autoencoder", "--out", a / "cache")
    message = run_cache("debug", settings, b / "cache", a / "autoencoder")
    assert text.replace(str(a / "cache"), str(b / "cache")) == message + "\n"
    shards = [name for name in contents(a / "cache") if name.endswith(".safetensors")]
    assert shards
    assert all(contents(a / "cache")[name] == contents(b / "cache")[name] for name in shards)
    text = verb("export", a, "--out", tmp_path / "x", "--license", "mit")
    message = export_run(b, tmp_path / "y", license="mit")
    assert text == message.replace(str(tmp_path / "y"), str(tmp_path / "x")) + "\n"


@pytest.mark.parametrize(
    ("arguments", "function"),
    [
        (["autoencoder", "--recipe", "debug"], lambda: run_autoencoder("debug", dry_run=True)),
        (["diffusion", "--recipe", "debug"], lambda: run_diffusion("debug", dry_run=True)),
        (["base"], lambda: run_base("tiny-base", dry_run=True)),
        (["dc-ae", "--phase", 2], lambda: run_dc_ae("dc-ae-small-f32", phase=2, dry_run=True)),
    ],
)
def test_dry_runs(arguments: list[str], function: Callable[[], str]) -> None:
    assert verb("train", *arguments, "--dry-run") == function() + "\n"


def test_ablate(tmp_path: Path) -> None:
    settings = ["seeds=[0]", "samples=4", "variants={full: []}"]
    verb("ablate", "--recipe", "ablation-debug", "--out", tmp_path / "a", *settings)
    result = run_ablation(load_ablation("ablation-debug", settings), tmp_path / "b")
    written = json.loads((tmp_path / "a" / "ablation.json").read_text())
    assert written["variants"] == result.to_json()["variants"]
    assert (tmp_path / "b" / "ablation.png").is_file()


def test_bench(tmp_path: Path) -> None:
    options = ["--resolution", 32, "--repeats", 1, "--device", "cpu", "--json", tmp_path / "b.json"]
    verb("bench", "autoencoder", "debug", *options)
    result = bench_autoencoder("debug", resolution=32, repeats=1, device="cpu")
    assert untimed(json.loads((tmp_path / "b.json").read_text())) == untimed(result.to_json())


def test_compare(here: Path, tmp_path: Path) -> None:
    options = ["--resolution", 32, "--images", 2, "--repeats", 1, "--json", tmp_path / "c.json"]
    verb("compare", "autoencoder", f"a={here / 'vae'}", "--data", "procedural:4", *options)
    result = compare_autoencoders({"a": here / "vae"}, data="procedural:4", resolution=32, images=2, repeats=1)
    assert untimed(json.loads((tmp_path / "c.json").read_text())) == untimed(result.to_json())


def test_evaluate_reconstruction(here: Path, tmp_path: Path) -> None:
    options = ["--data", "procedural:6", "--resolution", 32, "--images", 4, "--device", "cpu"]
    options += ["--crops", f"photos={here / 'photos'}", "--json", tmp_path / "r.json"]
    text = verb("evaluate", "reconstruction", here / "vae", *options)
    report = evaluate_reconstruction(
        here / "vae",
        "procedural:6",
        resolution=32,
        images=4,
        crops={"photos": here / "photos"},
        device="cpu",
    )
    written = json.loads((tmp_path / "r.json").read_text())
    assert untimed(written) == untimed(json.loads(json.dumps(report.to_json())))
    assert report.crops == {"fine texture": 4, "photos": 3}
    assert f"{report.figures()['upgraded']['photos: psnr']:.4g}" in text


def test_evaluate_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))  # no Inception there
    options = ["--reference", "procedural:6", "--beside", "other=debug", "--count", 4, "--steps", 1]
    options += ["--batch", 2, "--device", "cpu", "--out", tmp_path / "a"]
    text = verb("evaluate", "generation", "debug", *options)
    report = evaluate_generation(
        "debug",
        "procedural:6",
        beside={"other": "debug"},
        count=4,
        steps=1,
        batch=2,
        device="cpu",
        out=tmp_path / "b",
    )
    assert report is not None
    written = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    ours = json.loads(json.dumps(report.to_json()).replace(str(tmp_path / "b"), str(tmp_path / "a")))
    assert untimed(written) == untimed(ours)
    made = [untimed(contents(tmp_path / name / "upgraded")) for name in ("a", "b")]
    assert made[0] == made[1]
    assert list(report.missing()) == ["fid/inception"]
    assert f"{report.figures()['other']['swd/finest']:.4g}" in text


def test_inspect(here: Path, tmp_path: Path) -> None:
    options = ["--beside", here / "vae", "--data", "procedural:12", "--images", 10, "--resolution", 32]
    options += ["--method", "pca", "--device", "cpu"]
    text = verb("inspect", here / "vae", *options, "--out", tmp_path / "a")
    found = inspect_latents(
        here / "vae",
        "procedural:12",
        beside=[here / "vae"],
        images=10,
        resolution=32,
        method="pca",
        device="cpu",
    )
    assert list(found) == ["vae", "vae (2)"]
    files = write_inspection(found, tmp_path / "b")
    assert [Path(line).name for line in text.splitlines()[-len(files) :]] == [file.name for file in files]
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_convert(tmp_path: Path) -> None:
    save_file(official(), tmp_path / "dit.safetensors")
    text = verb("convert", "lightningdit", tmp_path / "dit.safetensors", "--out", tmp_path / "a")
    made = convert_lightningdit_file(tmp_path / "dit.safetensors", tmp_path / "b")
    assert text == f"{made}\n".replace(str(tmp_path / "b"), str(tmp_path / "a"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_doctor() -> None:
    assert json.loads(verb("doctor", "--json")) == installation()
    assert verb("doctor") == installation_text(installation()) + "\n"


def test_choices_are_those_of_the_functions() -> None:
    """The verbs name them again: importing them from the functions would import torch."""
    of_training = get_type_hints(bench_training)
    for ours, theirs in (
        (bench.Stage, StageName),
        (bench.Tune, of_training["tune"]),
        (bench.Precision, of_training["precision"]),
        (cache.ShardFormat, Format),
        (convert.Which, Which),
        (export.Format, ExportFormat),
        (inspect.Method, Method),
        (convert.ChannelOrder, ChannelOrder),
    ):
        assert set(get_args(ours)) == set(get_args(theirs))
