"""What a run keeps besides checkpoints: whole after a kill or a power cut, and nobody else's meanwhile."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tests.training.test_loop import _Stage

from davae.errors import DavaeError
from davae.runtime.atomic_files import atomic_folder, atomic_write
from davae.training.checkpoints.run_directory import RunDirectory, read_metrics
from davae.training.loop.loop import train
from davae.training.runs.export import export_run


class _Killed(BaseException):
    """As a kill: nothing tidies up after it."""


def _killed_in_step(number: int, out: Path, **loop: object) -> None:
    """Train until a step begins, and die."""
    stage, seen = _Stage(**loop), []

    def die(*_: object) -> None:
        seen.append(1)
        if len(seen) == number:
            raise _Killed

    stage.objective.register_forward_pre_hook(die)
    stage.objective.bad_step = 1
    with pytest.raises(_Killed):
        train(stage, out, {})


def _finish(out: Path, **loop: object) -> None:
    stage = _Stage(**loop)
    stage.objective.bad_step = 1
    train(stage, out, {})


@pytest.mark.parametrize("step", [3, 7], ids=["before the first checkpoint", "after it"])
def test_steps_are_told_once_however_often_the_run_was_killed(step: int, tmp_path: Path) -> None:
    _finish(tmp_path / "whole")
    killed = tmp_path / "killed"
    for _ in range(2):
        _killed_in_step(step if not (killed / "checkpoints" / "step-4").is_dir() else 2, killed)
        with (killed / "metrics.jsonl").open("a") as file:
            file.write('{"step": 3, "tot')  # a line cut short
    other = killed / "skipped_steps.rank-1.jsonl"  # of a second process, in a life that came further
    other.write_text('{"step": 1}\n{"step": 8}\n')
    _finish(killed)
    for name in ("metrics.jsonl", "skipped_steps.jsonl"):
        assert (killed / name).read_text() == (tmp_path / "whole" / name).read_text()
    steps = [json.loads(line)["step"] for line in other.read_text().splitlines()]
    assert steps == ([] if step == 3 else [1])


def test_lines_that_are_none_hide_no_others(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2, "to{"step": 1}\n\x00\x00\xff\n[]\n{"step": 3}\n')
    assert [line["step"] for line in read_metrics(file)] == [1, 3]


@pytest.mark.parametrize("damage", ["", "loop: {steps", "- a list"])
def test_damaged_settings_are_written_anew_unless_there_is_something_to_lose(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    RunDirectory(tmp_path, {"loop": {"steps": 8}}).begin()
    config = tmp_path / "config.yaml"
    config.write_text(damage)
    train(_Stage(), tmp_path, {"loop": {"steps": 8}}, stop_after=3)
    assert "config.yaml is damaged" in caplog.text
    assert (tmp_path / "config.yaml.damaged").read_text() == damage
    assert "steps: 8" in config.read_text()
    config.write_text(damage)
    with pytest.raises(DavaeError, match=r"config\.yaml is damaged.*remove the file and run the same command"):
        train(_Stage(), tmp_path, {"loop": {"steps": 8}})
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "config.json").write_text("{}")
    with pytest.raises(DavaeError, match=r"config\.yaml is damaged: remove it and run"):
        export_run(tmp_path, tmp_path / "export")
    config.unlink()
    train(_Stage(), tmp_path, {"loop": {"steps": 8}})


def test_another_run_that_begins_between_the_look_and_the_lock_is_seen(tmp_path: Path) -> None:
    late = RunDirectory(tmp_path, {"loop": {"steps": 8}})
    RunDirectory(tmp_path, {"loop": {"steps": 9}}).begin()
    with pytest.raises(DavaeError, match=r"loop\.steps: 9 -> 8"), late.locked():
        pass
    with RunDirectory(tmp_path, {"loop": {"steps": 9}}).locked():  # and left the lock
        assert "steps: 9" in (tmp_path / "config.yaml").read_text()


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was flushed or renamed, in order."""
    message: list[str] = []
    flush, rename, replace = os.fsync, Path.rename, Path.replace
    monkeypatch.setattr(os, "fsync", lambda f: (message.append(Path(f"/proc/self/fd/{f}").readlink().name), flush(f)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (message.append(f"{a.name} -> {b.name}"), rename(a, b)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (message.append(f"{a.name} -> {b.name}"), replace(a, b)))
    return message


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files are read from /proc")
def test_bytes_reach_the_disk_before_their_name(tmp_path: Path, on_disk: list[str]) -> None:
    """A rename alone may leave an empty file after a power cut."""
    atomic_write(tmp_path / "a.txt", "a")
    own = f"{os.getpid()}.partial"
    assert on_disk == [f".a.txt.{own}", f".a.txt.{own} -> a.txt", tmp_path.name]
    on_disk.clear()
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "c.txt").write_text("c")
    assert on_disk == ["c.txt", f".b.{own}", f".b.{own} -> b", tmp_path.name]
    on_disk.clear()
    train(_Stage(best_metric="weight"), tmp_path / "run", {})
    for name in ("config.yaml", "environment.json", "best.json"):
        beside = f".{name}.{own}"
        assert on_disk.index(beside) < on_disk.index(f"{beside} -> {name}")


def test_weights_to_begin_with_cannot_come_or_go_later(tmp_path: Path) -> None:
    plain = {"autoencoder": {"start_from": None}}
    RunDirectory(tmp_path, plain).begin()
    with pytest.raises(DavaeError, match=r"autoencoder\.start_from: None -> there"):
        RunDirectory(tmp_path, {"autoencoder": {"start_from": "there"}})
    with pytest.raises(DavaeError, match=r"autoencoder_folder: None -> ae"):  # of the other stage
        RunDirectory(tmp_path, {**plain, "autoencoder_folder": "ae"})
