"""How a command ends: errors of the system and signals in one line, davae's own mistakes with their traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from davae.cli import main
from davae.errors import DavaeError
from davae.runtime import places
from davae.runtime.text_files import read_object
from davae.training.loop.signals import StopRequest

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
SYSTEM = [
    (FULL, "the disk is full; make room"),
    (OSError(errno.EDQUOT, "quota"), "the disk is full; make room"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "the disk is full; make room"),
    (PermissionError(errno.EACCES, "Permission denied", "a/b.png"), "a/b.png: Permission denied"),
    (OSError(errno.EROFS, "x", "/ro/file"), "/ro/file: Read-only file system"),
    (OSError(errno.EIO, "x"), "Input/output error"),
    (OSError("we could not\n  connect to the hub"), "we could not connect to the hub"),
    (MemoryError(), "the memory is not enough"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate"), "the device's memory is not enough"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory is not enough"),
]


def ending(monkeypatch: pytest.MonkeyPatch, work: Callable[[], None], *arguments: object) -> object:
    """The status of a verb whose work is this."""
    monkeypatch.setattr("davae.bases.generate.write_images", lambda *_, **__: work())
    monkeypatch.setattr(sys, "argv", ["davae", *map(str, arguments or ("generate", "tiny", "tree", "--out", "none"))])
    with pytest.raises(SystemExit) as end:
        main.main()
    return end.value.code


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


@pytest.mark.parametrize(("error", "said"), SYSTEM, ids=[str(i) for i in range(len(SYSTEM))])
def test_an_error_of_the_system_is_one_line(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ending(monkeypatch, raising(error)) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith(f"davae: {said}")


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), RuntimeError("x"), AssertionError(), ValueError("x")])
def test_what_is_ours_to_mend_shows_where_it_came_up(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("davae.bases.generate.write_images", lambda *_, **__: raising(error)())
    monkeypatch.setattr(sys, "argv", ["davae", "generate", "tiny", "tree", "--out", "none"])
    with pytest.raises(type(error)):
        main.main()


def test_a_file_that_ends_too_early_is_not_passed_over_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """typer takes every ``EOFError`` for the end of the person's input and says ``Aborted.``"""
    monkeypatch.setattr("davae.bases.generate.write_images", lambda *_, **__: raising(EOFError("no data left"))())
    monkeypatch.setattr(sys, "argv", ["davae", "generate", "tiny", "tree", "--out", "none"])
    with pytest.raises(RuntimeError, match="a file ended too early") as found:
        main.main()
    assert isinstance(found.value.__cause__, EOFError)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_signal_outside_of_training_is_one_line_and_leaves_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def work() -> None:
        with places.claim(tmp_path / "out", "result") as folder:
            (folder / "half").write_text("x")
            signal.raise_signal(number)
            raise AssertionError("went on")

    assert ending(monkeypatch, work) == 128 + number
    told = capsys.readouterr().err
    assert told.startswith(f"davae: stopped by {name}; what is finished is kept")
    assert told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(number) == before


def test_what_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:

        def work() -> None:
            signal.raise_signal(signal.SIGHUP)
            with StopRequest() as stop:
                signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
            raise DavaeError("came to its end")

        assert ending(monkeypatch, work) == 2
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_a_training_answers_the_first_signal_at_once(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    number = getattr(signal, name)
    with StopRequest() as stop:
        signal.raise_signal(number)
        told = capfd.readouterr().err
        assert f"{name}: saving and stopping after this step" in told
        assert ("again ends it at once" in told) == (name == "SIGINT")
        if name == "SIGINT":
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        else:
            signal.raise_signal(number)
        assert capfd.readouterr().err == ""
    assert stop.received == number
    with StopRequest(quiet=True):
        signal.raise_signal(number)
    assert capfd.readouterr().err == ""


VERBS = [
    ("generate", "tiny", "tree"),
    ("upgrade", "tiny", "--autoencoder", "vae"),
    ("export", "run"),
    ("cache",),
    ("demo",),
    ("ablate",),
    ("inspect", "vae"),
    ("train", "autoencoder"),
    ("train", "diffusion"),
    ("train", "base"),
    ("train", "dc-ae"),
    ("convert", "vavae", "file.pt"),
    ("convert", "lightningdit", "file.pt"),
    ("convert", "davae-imagenet", "file.pt"),
    ("convert", "davae-sd3", "file.pt", "--base", "b"),
    ("evaluate", "generation", "tiny", "--reference", "procedural:4"),
    ("compare", "autoencoder", "a=b", "--data", "procedural:4", "--resolution", "32"),
]


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_refuses_a_folder_of_somebody_else_before_any_work(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "holiday.jpg").write_text("mine")
    monkeypatch.setenv("COLUMNS", "300")
    assert ending(monkeypatch, lambda: None, *verb, "--out", tmp_path) == 2
    told = capsys.readouterr().err
    assert "holiday.jpg" in told
    assert "--out" in told
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.jpg"]


@pytest.mark.parametrize(
    "verb",
    [
        ("train", "autoencoder", "--recipe", "debug"),
        ("train", "base"),
        ("train", "dc-ae"),
        ("ablate", "--recipe", "ablation-debug"),
        ("generate", "debug", "tree"),
        ("demo", "--recipe", "debug"),
        ("evaluate", "generation", "debug", "--reference", "procedural:4"),
        ("inspect", "vae"),
    ],
    ids=" ".join,
)
def test_a_default_folder_that_cannot_be_written_is_told_before_models_are_loaded(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr("davae.bases.open.load_base", raising(AssertionError("loaded")))
    monkeypatch.setattr(sys, "argv", ["davae", *verb])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 2
    assert "cannot be written: you may not write in" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "verb",
    [
        ("plan", "debug", "--resolution", "64"),
        ("bench", "autoencoder", "debug", "--resolution", "32", "--repeats", "1"),
    ],
    ids=" ".join,
)
def test_figures_are_kept_where_nobody_reads_the_table(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As in ``davae bench ... --json figures.json | head -1``."""

    def closed(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr("davae.runtime.console.PlainConsole.print", closed)
    monkeypatch.setattr(sys, "argv", ["davae", *verb, "--json", str(tmp_path / "figures.json")])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    assert read_object(tmp_path / "figures.json")["base"] == "debug"


def test_a_disk_that_fills_up_leaves_no_half_of_a_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def work() -> None:
        with places.claim(tmp_path / "out", "result") as folder:
            (folder / "half").write_text("x")
            raise FULL

    assert ending(monkeypatch, work) == 2
    assert "the disk is full" in (told := capsys.readouterr().err)
    assert "Nothing is left half-written; make room and run the same command again" in told
    assert list(tmp_path.iterdir()) == []
