"""``davae export``: from run directories of both stages to folders for others."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from PIL import Image
from tests.dying import every_death
from tests.pipelines.parts import upgraded

import davae
from davae.bases.tiny import debug_base
from davae.cli.main import main
from davae.pipelines import attach_lora, merge_lora
from davae.pipelines.saving import adapters
from davae.training.runs.export import export_run


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
    (run / "samples").mkdir()
    for step in (2, 10):
        Image.new("RGB", (step, 1)).save(run / "samples" / f"step-{step}.png")
    assert davae_verb(monkeypatch, "export", run, "--out", tmp_path / "merged") == 0
    assert Image.open(tmp_path / "merged" / "samples.png").size == (10, 1)
    assert "](<samples.png>)" in (tmp_path / "merged" / "README.md").read_text()
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
    monkeypatch.setattr(adapters, "snapshot_download", lambda name, **_: {"me/small": folder}[name])
    assert davae.load_adapters(debug_base(), None, "me/small").transformer.peft_config
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


PRIVATE = "/home/someone/secret project"


@pytest.fixture
def private_run(run: Path) -> Path:
    """The run of somebody whose folders say more than they should."""
    recipe = {
        "kind": "upgrade",
        "base": f"{PRIVATE}/bases/sd3",
        "data": {"path": f"{PRIVATE}/photos", "cache": "~/caches/x", "tables": [f"{PRIVATE}/a.csv", "hub/name"]},
        "autoencoder_folder": f"{PRIVATE}/vae",
    }
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    command = f"davae train diffusion --recipe '{PRIVATE}/r.yaml' 'data.path={PRIVATE}/photos' --out=~/runs/x"
    (run / "environment.json").write_text(json.dumps({"command": command}))
    for part in ("vae", "transformer"):
        file = run / "pipeline" / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"_name_or_path": f"{PRIVATE}/{part}"}))
    return run


@pytest.mark.parametrize("adapters", [[], ["--adapters"]], ids=["merged", "adapters"])
def test_what_is_handed_on_shows_no_private_path(
    adapters: list[str], private_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    for stray in (".env", "notes.txt", "vae/id_rsa", "vae/.secret", "transformer/optimizer.pt", "adapters.json"):
        (private_run / "pipeline" / stray).write_text("key")
    assert davae_verb(monkeypatch, "export", private_run, "--out", out, "--license", "mit", *adapters) == 0
    for file in out.rglob("*"):
        if file.is_file():
            content = file.read_bytes().decode(errors="ignore")
            for word in ("someone/", "secret", "/home/", "~/caches"):
                assert word not in content, (file, word)
    card = (out / "README.md").read_text()
    assert "base_model: sd3\n" in card
    assert "davae train diffusion --recipe r.yaml data.path=photos --out=x" in card
    for kept in ("path: photos", "cache: x", "- a.csv", "- hub/name"):
        assert kept in card
    names = {p.name for p in out.rglob("*") if p.is_file()}
    assert not names & {".env", "notes.txt", "id_rsa", ".secret", "optimizer.pt", "adapters.json"}
    config = out / ("autoencoder/config.json" if adapters else "vae/config.json")
    assert json.loads(config.read_text())["_name_or_path"] == "vae"


@pytest.mark.parametrize(
    "place", ["pipeline/vae/davae.py", "pipeline/transformer", "pipeline", "pipeline/model_index.json"]
)
def test_links_are_not_followed(
    place: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = tmp_path / "elsewhere"
    (run / place).rename(elsewhere)
    (run / place).symlink_to(elsewhere)
    monkeypatch.setenv("COLUMNS", "500")
    assert davae_verb(monkeypatch, "export", run, "--out", tmp_path / "out") == 2
    assert "is a link to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_adapters_take_an_autoencoder_and_nothing_else(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe of a run from somebody else may name any folder of this disk."""
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text('{"_class_name": "Other", "key": 1}')
    recipe = yaml.safe_load((run / "config.yaml").read_text()) | {"autoencoder_folder": str(secret)}
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    (run / "pipeline" / "vae").rename(tmp_path / "vae")
    arguments = ("export", run, "--out", tmp_path / "out", "--adapters")
    assert davae_verb(monkeypatch, *arguments) == 2
    assert "no longer exists" in capsys.readouterr().err
    (run / "config.yaml").write_text(yaml.safe_dump(recipe | {"autoencoder_folder": str(tmp_path / "vae")}))
    (tmp_path / "vae" / "id_rsa").write_text("key")
    assert davae_verb(monkeypatch, *arguments) == 0
    assert not list((tmp_path / "out").rglob("id_rsa"))


@pytest.mark.parametrize("there", ["absent", "empty"])
def test_an_export_killed_anywhere_can_be_given_again(there: str, run: Path, tmp_path: Path) -> None:
    """Its own half would otherwise refuse it; what is there meanwhile is nothing or the whole."""
    work = tmp_path / "work"
    out = work / "out"

    def start() -> None:
        shutil.rmtree(work, ignore_errors=True)
        (out if there == "empty" else work).mkdir(parents=True)

    whole: dict[str, bytes] = {}
    for number in every_death(lambda: export_run(run, out) and None, work, start):
        found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        if number % 9 == 0 or found:
            if not found:
                export_run(run, out)
                found = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
            whole = whole or found
            assert found == whole
            assert [p.name for p in work.iterdir() if not p.name.endswith(("partial", "lock"))] == ["out"]
    assert {"README.md", "model_index.json", "vae/config.json"} <= whole.keys()
