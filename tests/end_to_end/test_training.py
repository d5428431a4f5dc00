"""Both stages, from a recipe to a diffusers folder: losses as stored, and a kill that leaves no trace."""

import hashlib
import json
import signal
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from tests.end_to_end import children

from davae.bases.tiny import debug_base
from davae.models import AutoencoderDA
from davae.recipes.read import load_recipe
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.runs.train import train_autoencoder, train_diffusion

STORED = Path(__file__).with_name("debug_losses.json")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the same order as in the other process
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def debug_run(tmp_path_factory):
    """Both stages of the debug recipe, undisturbed."""
    out = tmp_path_factory.mktemp("debug")
    recipe = load_recipe("debug")
    stage1 = train_autoencoder(recipe, out / "autoencoder")
    stage2 = train_diffusion(recipe, out / "diffusion", stage1.result)
    return out, stage1, stage2


def test_losses_are_as_stored(debug_run):
    """A refactor must not move them. `python -m tests.end_to_end.test_training` writes them anew."""
    out, _, _ = debug_run
    stored = json.loads(STORED.read_text())
    for stage, lines in stored.items():
        found = read_metrics(out / stage / "metrics.jsonl")
        assert len(found) == len(lines)
        for line, expected in zip(found, lines):
            assert line == pytest.approx(expected, rel=2e-3, abs=1e-5), f"{stage} step {line['step']}"


def test_the_result_opens_with_diffusers_and_makes_twice_the_size(debug_run):
    _, stage1, stage2 = debug_run
    base = debug_base()
    pipe = DiffusionPipeline.from_pretrained(stage2.result)
    assert type(pipe) is type(base)
    vae = AutoencoderDA.from_pretrained(stage1.result)
    assert vae.config.detail_mean is not None
    settings = {"num_inference_steps": 2, "output_type": "np"}
    small = base([0], generator=torch.Generator().manual_seed(0), **settings).images
    large = pipe([0], generator=torch.Generator().manual_seed(0), **settings).images
    assert (small.shape[1], large.shape[1]) == (16, 32)


def test_what_the_transformer_sees_is_normalised(debug_run):
    """Mean 0 and variance 1 a detail channel over the images the statistics were measured on."""
    _, stage1, _ = debug_run
    vae = AutoencoderDA.from_pretrained(stage1.result)
    from davae.data import open_dataset
    from davae.models.latent_space import encode, to_model_space

    data = open_dataset("procedural:48", resolution=32)
    images = torch.stack([data[i]["image"] for i in range(24)])
    with torch.no_grad():
        latent = to_model_space(vae, encode(vae, images))
    detail = vae.layout.split(latent)[1].transpose(0, 1).flatten(1)
    torch.testing.assert_close(detail.mean(1), torch.zeros(8), atol=1e-3, rtol=0)
    torch.testing.assert_close(detail.std(1), torch.ones(8), atol=1e-2, rtol=0)


def test_both_stages_train_in_bfloat16(debug_run, tmp_path):
    """Weights stay in float32, losses finite and near those in float32."""
    _, stage1, _ = debug_run
    recipe = load_recipe(
        "debug",
        [f"{s}.loop.{k}" for s in ("autoencoder", "diffusion") for k in ("precision=bf16", "steps=2")],
    )
    train_autoencoder(recipe, tmp_path / "autoencoder")
    train_diffusion(recipe, tmp_path / "diffusion", stage1.result)
    stored = json.loads(STORED.read_text())
    for stage in ("autoencoder", "diffusion"):
        found = read_metrics(tmp_path / stage / "metrics.jsonl")[0]
        assert found["total"] == pytest.approx(stored[stage][0]["total"], rel=0.05)
    vae = AutoencoderDA.from_pretrained(tmp_path / "autoencoder" / "autoencoder")
    assert vae.dtype == torch.float32


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_kill_minus_nine_leaves_no_trace(stage, debug_run, tmp_path):
    _, stage1, _ = debug_run
    overrides = [f"{stage}.loop.steps=12", f"{stage}.loop.log_every=4"]
    extra = ["--autoencoder", str(stage1.result)] if stage == "diffusion" else []
    killed, log = tmp_path / "killed", tmp_path / "log"
    words = ["davae", "train", stage, "--recipe", "debug", *extra, "--out", str(killed), *overrides]
    process = children.start(children.davae, words, log=log, limit_s=240)
    while not (killed / "checkpoints" / "step-4").is_dir():
        assert process.is_alive(), log.read_text()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    assert not list(killed.glob("*/*.safetensors")), "nothing is exported before the end"

    recipe = load_recipe("debug", overrides)
    for out in (killed, tmp_path / "whole"):
        if stage == "autoencoder":
            train_autoencoder(recipe, out)
        else:
            train_diffusion(recipe, out, stage1.result)
    assert _hashes(killed) == _hashes(tmp_path / "whole")
    assert read_metrics(killed / "metrics.jsonl") == read_metrics(tmp_path / "whole" / "metrics.jsonl")


def _hashes(out: Path) -> dict[str, str]:
    """Hashes of the exported weights and of the last checkpoint."""
    files = [*out.rglob("diffusion_pytorch_model.safetensors"), *(out / "checkpoints" / "step-12").iterdir()]
    assert len(files) > 2
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def _write_stored_losses() -> None:
    import tempfile

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        out, recipe = Path(folder), load_recipe("debug")
        stage1 = train_autoencoder(recipe, out / "autoencoder")
        train_diffusion(recipe, out / "diffusion", stage1.result)
        stored = {s: read_metrics(out / s / "metrics.jsonl") for s in ("autoencoder", "diffusion")}
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    _write_stored_losses()
