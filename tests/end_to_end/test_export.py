"""``davae export``: from run directories of both stages to folders for others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from tests.pipelines.parts import upgraded

import davae
from davae.bases.tiny import debug_base
from davae.cli.main import main
from davae.pipelines import attach_lora, merge_lora


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run of the diffusion stage."""
    run = tmp_path / "run"
    pipe = upgraded(debug_base())
    attach_lora(pipe.transformer, LoraConfig(r=1, target_modules=["to_q"]))
    davae.save_adapters(pipe, run / "adapters")
    merge_lora(pipe.transformer)
    pipe.save_pretrained(run / "pipeline")
    recipe = {"kind": "upgrade", "base": "tiny", "autoencoder_folder": "/home/someone/vae"}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (run / "environment.json").write_text(
        json.dumps({"command": "davae train diffusion --recipe x", "device": "a GPU", "packages": {"torch": "2"}})
    )
    lines = [{"step": 1, "total": 2.0}, {"step": 2, "held_out_total": 0.25}, {"step": 2, "total": 1.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def davae_verb(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["davae", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_merged_pipeline_and_adapters(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert davae_verb(monkeypatch, "export", run, "--out", tmp_path / "merged") == 0
    assert "licence apache-2.0, from tiny" in capsys.readouterr().out
    assert isinstance(davae.load_pipeline(tmp_path / "merged").vae, davae.AutoencoderDA)
    card = (tmp_path / "merged" / "README.md").read_text()
    for said in ("| held_out_total | 0.25 |", "    davae train diffusion --recipe x", "torch 2", "on a GPU"):
        assert said in card, said
    assert "/home/someone" not in card

    assert davae_verb(monkeypatch, "export", run, "--out", tmp_path / "small", "--adapters") == 0
    folder = tmp_path / "small"
    pipe = davae.load_adapters(debug_base(), folder / "autoencoder", folder)
    assert pipe.transformer.peft_config
    assert "base_model_relation: adapter" in (folder / "README.md").read_text()


def test_what_goes_wrong_in_the_middle_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command would otherwise be refused by its own half."""
    (run / "environment.json").write_text("")
    assert davae_verb(monkeypatch, "export", run, "--out", tmp_path / "out") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    (run / "environment.json").unlink()
    assert davae_verb(monkeypatch, "export", run, "--out", tmp_path / "out") == 0


def test_mistakes_end_with_status_2_and_write_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")

    def refused(message: str, *arguments: object) -> None:
        assert davae_verb(monkeypatch, "export", *arguments) == 2
        assert message in capsys.readouterr().err

    refused("holds files already", run, "--out", run)
    refused("holds no pipeline", tmp_path, "--out", tmp_path / "out")
    (run / "config.yaml").write_text(yaml.safe_dump({"base": "someone/unknown"}))
    refused("--license", run, "--out", tmp_path / "out")
    assert davae_verb(monkeypatch, "export", run, "--out", tmp_path / "out", "--license", "mit") == 0
    (run / "pipeline" / "vae" / "davae.py").unlink()
    refused("saved by an older davae", run, "--out", tmp_path / "out2", "--license", "mit")
    assert not (tmp_path / "out2").exists()
