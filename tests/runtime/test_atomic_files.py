"""Files and folders are complete or absent; locks, hashes and a full disk."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from davae.errors import DavaeError
from davae.runtime.atomic_files import (
    atomic_file,
    atomic_folder,
    atomic_json,
    atomic_write,
    disk_full_as_error,
    file_hash,
    locked,
    system_error,
)
from davae.runtime.weight_files import atomic_tensors


def _interrupted(path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_text("half of the n")
        raise KeyboardInterrupt


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.txt", "old")
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path / "a.txt")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_while_writing_names_the_file(number: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"a\.json") as found, atomic_file(tmp_path / "a.json"):
        raise OSError(number, os.strerror(number))
    assert str(system_error(found.value)).startswith(f"{tmp_path / 'a.json'}: ")


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as found, atomic_file(tmp_path / "a.json"):
        (tmp_path / "b").read_bytes()
    assert found.value.filename == str(tmp_path / "b")


def test_text_bytes_values_and_tensors_come_back(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.txt", "\u03c3")
    assert (tmp_path / "a.txt").read_bytes() == b"\xcf\x83"
    atomic_write(tmp_path / "a.txt", b"\xff")
    assert (tmp_path / "a.txt").read_bytes() == b"\xff"
    atomic_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").read_text() == '{\n "a": 1\n}\n'
    tensor = torch.arange(6.0).view(2, 3).t()  # not contiguous
    atomic_tensors(tmp_path / "a.safetensors", {"w": tensor})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["w"], tensor)


def test_a_file_behind_a_link_is_replaced_not_the_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "a.txt").symlink_to(tmp_path / "disk" / "a.txt")
    for text in ("one", "two"):
        atomic_write(tmp_path / "a.txt", text)
        assert (tmp_path / "a.txt").is_symlink()
        assert (tmp_path / "disk" / "a.txt").read_text() == text


def test_text_that_cannot_be_encoded_is_written_with_a_sign_for_it(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "caf\udce9")  # as an argument that is not UTF-8 reaches Python
    assert (tmp_path / "a").read_text(encoding="utf-8") == "caf\ufffd"


def test_a_link_that_leads_to_itself_is_replaced(tmp_path: Path) -> None:
    link = tmp_path / "a.json"
    link.symlink_to("a.json")
    atomic_json(link, 1)
    assert link.read_text(encoding="utf-8") == "1\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_device_is_written_to_directly() -> None:
    atomic_write(Path("/dev/null"), "gone")
    assert Path("/dev/null").is_char_device()


def test_two_processes_that_share_a_name_have_files_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with atomic_file(tmp_path / "a") as own:
        assert str(os.getpid()) in own.name
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with atomic_file(tmp_path / "a") as other:
            other.write_text("other")
        own.write_text("own")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "own"  # whoever is last


def test_a_lock_is_refused_to_a_second_one_and_free_afterwards(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            locked(tmp_path / "lock", lambda: "not asked"),
            pytest.raises(DavaeError, match="somebody else works here"),
            locked(tmp_path / "lock", lambda: "somebody else works here"),
        ):
            raise AssertionError("both hold it")


def test_the_hash_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_full_disk_says_what_is_kept_and_other_errors_stay(tmp_path: Path) -> None:
    with (
        pytest.raises(DavaeError, match=r"the disk is full: .* MB are free in .*new\. All is well; make room"),
        disk_full_as_error(tmp_path / "new", "All is well"),
    ):
        raise OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="denied"), disk_full_as_error(tmp_path, "All is well"):
        raise OSError(errno.EACCES, "denied")


def test_a_link_to_another_disk_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "pipeline").symlink_to(tmp_path / "disk")
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "pipeline") as folder:
            (folder / "weights").write_text(text)
    assert (tmp_path / "pipeline").is_symlink()
    assert (tmp_path / "disk" / "weights").read_text() == "two"


def test_an_empty_folder_where_somebody_stands_is_filled_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mount cannot be renamed, and a shell that stands in the folder would stand nowhere."""
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.chdir(out)
    number = out.stat().st_ino
    with pytest.raises(FileNotFoundError), atomic_folder(out):
        raise FileNotFoundError
    assert list(out.iterdir()) == []
    with atomic_folder(out) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("new")
        assert folder.parent == out
    assert out.stat().st_ino == number
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*")) == ["inner", "inner/file"]


def test_a_kill_between_two_names_loses_neither(tmp_path: Path) -> None:
    """The old folder had lost its name and the new one had none yet; then there was no room to write it again."""
    old, new = tmp_path / ".out.removed", tmp_path / ".out.partial"
    for folder in (old, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with pytest.raises(OSError, match="no room"), atomic_folder(tmp_path / "out"):
        raise OSError("no room")
    assert (tmp_path / "out" / "file").read_text() == ".out.removed"


def test_a_folder_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    result = tmp_path / "run" / "pipeline"
    for text in ("one", "two"):
        with atomic_folder(result) as folder:
            (folder / "weights").write_text(text)
    with pytest.raises(FileNotFoundError), atomic_folder(result) as folder:
        (folder / "absent" / "weights").write_text("three")
    assert (result / "weights").read_text() == "two"
    (result.parent / ".pipeline.partial").mkdir()  # as a kill leaves it
    (result.parent / ".pipeline.partial" / "left").write_text("over")
    with atomic_folder(result) as folder:
        (folder / "weights").write_text("four")
    assert [path.name for path in result.parent.iterdir()] == ["pipeline"]
    assert [path.name for path in result.iterdir()] == ["weights"]
    assert (result / "weights").read_text() == "four"
