"""A folder is written by the one who claimed it, is whole or as before at the end, and is never somebody else's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from davae.errors import DavaeError
from davae.runtime import atomic_files
from davae.runtime.atomic_files import LOCK, MARK, atomic_folder, atomic_write, set_aside
from davae.runtime.places import _KINDS, check_place, claim, safe_name
from tests.dying import every_death

WHOLE = [name for name, kind in _KINDS.items() if kind.whole]
OVER_TIME = [name for name, kind in _KINDS.items() if not kind.whole]


def tree(folder: Path) -> dict[str, str]:
    """Every file that is seen, with its text."""
    names = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return {p.as_posix(): (folder / p).read_text() for p in names if not any(q.startswith(".") for q in p.parts)}


def fill(folder: Path, text: str) -> None:
    for name in ("model_index.json", "vae/config.json", "vae/weights", "README.md"):
        atomic_write(folder / name, text if name != "vae/config.json" else '{"_class_name": "AutoencoderDA"}')


@pytest.mark.parametrize("kind", list(_KINDS))
def test_what_is_somebody_else_s_is_refused_and_stays(kind: str, tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "config.yaml").write_text("password: !secret x")
    (tmp_path / "environment.json").write_text('{"packages": ["other"]}')
    before = tree(tmp_path)
    with pytest.raises(DavaeError, match="--out"):
        check_place(tmp_path, kind)
    with pytest.raises(DavaeError, match=r"config\.yaml"), claim(tmp_path, kind):
        raise AssertionError("claimed")
    assert tree(tmp_path) == before
    assert {p.name for p in tmp_path.iterdir()} == {"pipeline", "config.yaml", "environment.json"}


@pytest.mark.parametrize("kind", OVER_TIME)
def test_over_time_a_kind_goes_on_in_its_own(kind: str, tmp_path: Path) -> None:
    out = tmp_path / "a" / "out"
    with pytest.raises(ZeroDivisionError), claim(out, kind):
        raise ZeroDivisionError
    assert not out.exists()  # nothing was written
    for text in ("one", "two"):
        with claim(out, kind) as place:
            assert place == out
            atomic_write(place / "file", text)
            with pytest.raises(DavaeError, match=f"is in use: process {os.getpid()} on"), claim(out, kind):
                raise AssertionError("claimed twice")
    assert tree(out) == {"file": "two"}
    for other in set(_KINDS) - {kind}:
        with pytest.raises(DavaeError, match="--out"):
            check_place(out, other)


def test_an_empty_folder_stays_where_nothing_was_written(tmp_path: Path) -> None:
    for kind in _KINDS:
        with pytest.raises(ZeroDivisionError), claim(tmp_path, kind):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == []


def test_a_log_that_the_shell_has_begun_is_in_nobody_s_way(tmp_path: Path) -> None:
    for name in ("log", "slurm-7.out", "slurm-7.err", "train.log"):
        (tmp_path / name).write_text("began")
    for kind in OVER_TIME:
        check_place(tmp_path, kind)
    for kind in WHOLE:
        with pytest.raises(DavaeError, match="--out"):
            check_place(tmp_path, kind)


def test_leftovers_of_a_killed_process_are_removed_and_count_for_nothing(tmp_path: Path) -> None:
    for name in (MARK, LOCK, ".x.7.partial"):
        (tmp_path / name).write_text("")
    with claim(tmp_path, "images"):
        assert not (tmp_path / ".x.7.partial").exists()
        atomic_write(tmp_path / "x", "")
    assert {p.name for p in tmp_path.iterdir()} == {MARK, LOCK, "x"}


@pytest.mark.parametrize("old", ["absent", "empty", "stood in", "full"])
@pytest.mark.parametrize("exchange", [True, False], ids=["in one step", "in two steps"])
def test_killed_anywhere_it_is_the_old_one_or_the_new_one(
    old: str, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mix of two pipelines opens without complaint; a rerun must not be refused by its own half."""
    out, here = tmp_path / "work" / "out", tmp_path / "here"
    here.mkdir()
    if not exchange:
        monkeypatch.setattr(atomic_files, "_exchanged", lambda new, path: False)

    def start() -> None:
        os.chdir(here)
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        if old != "absent":
            out.mkdir(parents=True)
        if old == "stood in":
            os.chdir(out)
        if old == "full":
            fill(out, '{"old": 1}')
            (out / "notes.txt").write_text("mine")

    def work() -> None:
        with claim(out, "pipeline") as folder:
            fill(folder, '{"new": 1}')

    monkeypatch.chdir(here)
    new = {"model_index.json": '{"new": 1}', "vae/weights": '{"new": 1}', "README.md": '{"new": 1}'}
    new["vae/config.json"] = '{"_class_name": "AutoencoderDA"}'
    was = {name: text.replace("new", "old") for name, text in new.items()} if old == "full" else {}
    mine = {"notes.txt": "mine"} if old == "full" else {}
    deaths = 0
    for _ in every_death(work, tmp_path / "work", start):
        found = tree(out)
        if old == "stood in":  # moves in piece by piece: it does not open before the last of them
            assert found.keys() <= new.keys()
            assert found == new or "model_index.json" not in found
        elif not exchange and old == "full" and not out.exists():
            assert tree(out.with_name(".out.removed")) == was | mine  # the next call puts it back
        else:
            assert found in (was | mine, new | mine)
        deaths += 1
        os.chdir(here)
        if old == "stood in":
            os.chdir(out)
        work()
        assert tree(out) == new | mine
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        assert not [p.name for p in out.iterdir() if p.name.startswith(".")]
    assert deaths > 12


def test_what_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DavaeError, match="written meanwhile"), claim(out, "result") as folder:  # noqa: PT012
        fill(folder, "new")
        fill(out, "of somebody else")
    assert tree(out)["README.md"] == "of somebody else"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_at_once_are_told_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claim(out, "result") as folder:
        with pytest.raises(DavaeError, match="is in use: another process writes it"), claim(out, "result"):
            raise AssertionError("both write")
        fill(folder, "first")
    assert tree(out)["README.md"] == "first"


def test_a_base_and_a_finished_result_are_never_written_over(tmp_path: Path) -> None:
    fill(tmp_path / "tuned", "tuned")
    fill(tmp_path / "base", "base")
    (tmp_path / "base" / "vae" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(DavaeError, match="holds files already"):
        check_place(tmp_path / "tuned", "result")
    check_place(tmp_path / "tuned", "pipeline")
    for kind in ("result", "pipeline", "adapters"):
        with pytest.raises(DavaeError, match="--out"):
            check_place(tmp_path / "base", kind)


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "weights.safetensors").touch(mode=0o600)
        atomic_write(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert oct((tmp_path / "out" / "weights.safetensors").stat().st_mode & 0o777) == "0o640"
    assert oct((tmp_path / "file").stat().st_mode & 0o777) == "0o640"
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == "0o750"


@pytest.mark.parametrize("place", ["file/out", "/proc/none/out", "/dev/full/out"])
def test_a_place_that_cannot_be_written_is_one_line(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for kind in ("run", "result", "images"):
        with pytest.raises(DavaeError, match="cannot be"), claim(tmp_path / place, kind):
            raise AssertionError("claimed")


def test_an_error_in_the_second_rename_gives_the_old_one_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "out", "old")
    monkeypatch.setattr(atomic_files, "_exchanged", lambda new, path: False)
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "input/output error")
        return rename(self, target)

    with pytest.raises(OSError, match="input/output"), atomic_folder(tmp_path / "out") as folder:  # noqa: PT012
        fill(folder, "new")
        monkeypatch.setattr(Path, "rename", fails)
    assert tree(tmp_path / "out")["README.md"] == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_set_aside_is_never_written_over(tmp_path: Path) -> None:
    for number, name in enumerate(("config.yaml.damaged", "config.yaml.damaged-2", "config.yaml.damaged-3")):
        (tmp_path / "config.yaml").write_text(str(number))
        assert set_aside(tmp_path / "config.yaml") == tmp_path / name
        assert (tmp_path / name).read_text() == str(number)


@pytest.mark.parametrize("mark", ["", "[]", "null", '{"kind": "unheard of"}'])
def test_a_damaged_mark_takes_nothing(mark: str, tmp_path: Path) -> None:
    (tmp_path / MARK).write_text(mark)
    (tmp_path / "holiday.png").write_text("mine")
    with pytest.raises(DavaeError, match="not davae's"):
        check_place(tmp_path, "images")
    (tmp_path / "fingerprint.json").write_text('{"facts": {}, "hash": "x"}')
    if "kind" not in mark:
        check_place(tmp_path, "cache")  # known by what is in it


NAMES = [
    *(
        "no gan",
        "no-gan",
        "no_gan",
        "No Gan",
        "NO GAN",
        "no  gan",
        "no gan ",
        "../x",
        "..",
        ".",
        "",
        "/",
        "a/b",
        "a\\b",
    ),
    *("a:b", "con", "NUL", "lpt1", "x" * 300, "x" * 299, "\u00e9", "e\u0301", "\u6f22" * 300, "\ud800", "no\ngan"),
    *("*", "?", ".davae", "tail.", "tail", "runs", "x 0123456789ab", "[/x]", "~", "$HOME"),
]


def test_names_of_files_are_safe_and_told_apart() -> None:
    made = [safe_name(name) for name in NAMES]
    assert len({name.casefold() for name in made}) == len(NAMES)
    for name in made:
        assert Path(name).name == name
        assert not name.startswith((".", "-"))
        assert len(f"{name}-2147483647.png".encode()) <= 255
        assert name.split(".")[0].lower() not in ("con", "nul", "lpt1")
        assert not set(name) & set('<>:"/\\|?* \n.')
    assert safe_name("no gan") == "no-gan"  # and what is plain stays readable
    assert safe_name(safe_name("No Gan").replace("-", " ")) != safe_name("No Gan")


FOREIGN = {
    ".vscode/settings.json": '{"editor.fontSize": 14}',
    "cache.json": '{"etag": "x"}',
    "fingerprint.json": '{"hash": "x"}',
    "comparison.json": "[]",
    "inspection.json": '{"date": "today"}',
    "environment.json": '{"packages": {"numpy": "2"}}',
    "config.yaml": "- a list",
    "model_index.json": '{"vae": ["diffusers", "AutoencoderKL"]}',
    "vae/config.json": '{"_class_name": "AutoencoderKL"}',
    "run.lock": "",
    "summary.json": "{}",
}


@pytest.mark.parametrize("file", FOREIGN)
def test_a_name_alone_makes_no_folder_davae_s(file: str, tmp_path: Path) -> None:
    atomic_write(tmp_path / file, FOREIGN[file])
    for kind in _KINDS:
        with pytest.raises(DavaeError, match="--out"), claim(tmp_path, kind):
            raise AssertionError("claimed")
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {file}


def test_folders_of_earlier_versions_are_known(tmp_path: Path) -> None:
    facts = json.dumps({"packages": {"davae": "0.1.0"}})
    for kind, file, text in (
        ("run", "environment.json", facts),
        ("run", "level-1/environment.json", facts),
        ("base run", "transformer/environment.json", facts),
        ("demo", "diffusion/environment.json", facts),
        ("cache", "fingerprint.json", '{"facts": {}, "hash": "x"}'),
        ("ablation", "ablation.recipe.json", '{"variants": {}, "seeds": []}'),
        ("generation", "upgraded/settings.json", '{"pipeline": "x", "prompts": {}, "seed": 0}'),
        ("comparison", "comparison.json", '{"autoencoders": [], "resolution": 8}'),
        ("inspection", "inspection.json", '{"vae": {"psnr": {}}}'),
        ("pipeline", "vae/config.json", '{"_class_name": "AutoencoderDA"}'),
        ("adapters", "davae_adapter.safetensors", ""),
        ("adapters", "autoencoder/config.json", ""),
    ):
        folder = tmp_path / f"{kind} {file}".replace("/", " ")
        atomic_write(folder / file, text)
        check_place(folder, kind)


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}', '["../outside", "/tmp", "..", ".", ""]', b"\xff"])
def test_a_journal_from_elsewhere_removes_nothing(content: str | bytes, tmp_path: Path) -> None:
    """Of a folder from somebody else, whose hidden files say what a killed process had begun."""
    atomic_write(tmp_path / "outside" / "kept", "text")
    folder = tmp_path / "folder"
    atomic_write(folder / atomic_files._INSIDE / "names", content)
    with claim(folder, "result") as inside:
        atomic_write(inside / "new", "text")
    assert tree(tmp_path) == {"outside/kept": "text", "folder/new": "text"}


@pytest.mark.parametrize("content", ['{"a": 1}', "[]", '{"a": [1]}', "{"])
def test_another_program_s_inspection_is_no_error_of_ours(content: str, tmp_path: Path) -> None:
    (tmp_path / "inspection.json").write_text(content)
    with pytest.raises(DavaeError, match="files that are not davae's"):
        check_place(tmp_path, "run")
