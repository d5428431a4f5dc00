"""Where and in which precision ``davae generate`` and ``davae reconstruct`` run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from davae.bases import generate as generate_verb
from davae.bases.debug_pipelines import small_pipeline
from davae.bases.open import load_base
from davae.bases.tiny import debug_base
from davae.cli.main import app
from davae.data import render_scene
from davae.models import AutoencoderDA
from davae.pipelines import speed_up
from davae.pipelines.saving.opening import load_autoencoder
from davae.runtime import devices
from davae.training.runs import reconstruct as reconstruct_verb


class Stop(Exception):
    """Far enough."""


def _dtypes(pipe: Any) -> set[torch.dtype]:
    return {part.dtype for part in pipe.components.values() if isinstance(part, nn.Module)}


@pytest.fixture
def in_bfloat16(tmp_path: Path) -> Path:
    small_pipeline("sd3").to(torch.bfloat16).save_pretrained(tmp_path / "sd3")
    return tmp_path / "sd3"


def test_the_gpu_is_taken_before_the_measures_for_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """They follow from the device: the decoder's bfloat16, and backends of attention that refuse a CPU."""
    seen: list[Any] = []

    class Pipe:
        def to(self, device: str) -> Pipe:
            seen.append(("to", device))
            return self

    def load(name: str, *, variant: str | None, dtype: Any) -> Pipe:
        seen.append(("load", name, dtype))
        return Pipe()

    def fast(pipe: Pipe, *, compile: bool, attention: str | None) -> None:
        seen.append(("speed_up", attention))
        raise Stop

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(generate_verb, "load_base", load)
    monkeypatch.setattr(generate_verb, "speed_up", fast)
    for options, device, dtype in (
        ([], "cuda", "saved"),
        (["--device", "cuda:1", "--dtype", "float16"], "cuda:1", torch.float16),
        (["--device", "cpu"], "cpu", "saved"),
    ):
        seen.clear()
        arguments = ["generate", "x", "--prompt", "a", "--fast", "--attention", "flash", *options]
        assert isinstance(CliRunner().invoke(app, arguments).exception, Stop)
        assert seen == [("load", "x", dtype), ("to", device), ("speed_up", "flash")]


def test_reconstruct_takes_the_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(folder: Path, *, dtype: Any) -> Any:
        asked.append(dtype)
        return placed

    class Placed:
        def to(self, device: str) -> None:
            asked.append(device)
            raise Stop

    placed = Placed()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(reconstruct_verb, "load_autoencoder", load)
    assert isinstance(CliRunner().invoke(app, ["reconstruct", "x", "procedural:1"]).exception, Stop)
    assert asked == ["saved", "cuda"]


def test_a_pipeline_of_half_precision_runs_on_a_cpu_and_keeps_it_where_asked(
    in_bfloat16: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Text encoders and transformer agree: as they are read without a word, the former stay in bfloat16."""
    seen = []
    monkeypatch.setattr(
        generate_verb, "speed_up", lambda pipe, **options: seen.append(_dtypes(speed_up(pipe, **options)))
    )
    common = ["generate", str(in_bfloat16), "--prompt", "a", "--steps", "1", "--fast", "--out", str(tmp_path / "out")]
    for options, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        done = CliRunner().invoke(app, [*common, *options, "--device", "cpu"], catch_exceptions=False)
        assert done.exit_code == 0
        assert seen.pop() == {dtype}
        assert Image.open(tmp_path / "out" / "a-0.png").size == (32, 32)


def test_what_was_saved_is_read_from_the_files(in_bfloat16: Path, tmp_path: Path) -> None:
    assert devices.saved_dtype(in_bfloat16 / "transformer") == torch.bfloat16
    assert devices.saved_dtype(tmp_path) == torch.float32
    assert _dtypes(load_base(str(in_bfloat16), dtype="saved")) == {torch.bfloat16}
    assert _dtypes(load_base("debug-sd3", dtype=torch.bfloat16)) == {torch.bfloat16}
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8).to(torch.float16)
    vae.save_pretrained(tmp_path / "vae")
    assert load_autoencoder(tmp_path / "vae", dtype="saved").dtype == torch.float16
    assert load_autoencoder(tmp_path / "vae").dtype == torch.float32


def test_reconstruct_in_bfloat16_tells_nearly_the_same_gain(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8).save_pretrained(tmp_path / "vae")
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(render_scene(i, 0, 48)).save(tmp_path / "photos" / f"{i}.png")
    arguments = ["reconstruct", tmp_path / "vae", tmp_path / "photos", "--resolution", 32]
    arguments += ["--out", tmp_path / "rows.png", "--device", "cpu"]
    message = []
    for options in ([], ["--dtype", "bfloat16"]):
        done = CliRunner().invoke(app, [*map(str, arguments), *options], catch_exceptions=False)
        assert done.exit_code == 0
        message.append(float(done.output.split("PSNR ")[1].split()[0]))
    assert message[0] == pytest.approx(message[1], abs=0.2)
