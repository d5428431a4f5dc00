"""Files and folders that are complete or absent, whatever ends the process: a kill, a full disk, a power cut.

They are written beside under a hidden name, flushed to disk and then renamed: a rename may reach the disk before the
bytes do, so a file that was only renamed can be empty after a power cut. Everything that davae makes, renames or
removes on a disk is made, renamed and removed here, with the modes that the umask says; whose a folder is, and whether
it may be written, is asked in :mod:`davae.runtime.places`. Here stand also locks, the SHA-256 of a file, and what the
system's errors say in one line.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from davae.errors import DavaeError

LOCK, MARK = ".davae.lock", ".davae"
"""In folders that are written over time: the lock, and what kind they are of."""
_INSIDE = ".davae.partial"
"""Where an empty folder is filled that cannot be replaced; its file ``names`` says what had begun to move up."""
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A hidden path to be written within the block, which then takes the name ``path``.

    Until then what was there before stays. An error within the block removes the hidden file; a kill leaves it. Its
    name is this process's own, so that several may write the same file: whoever is last.

    Args:
        path: the file; its folder is made where absent. A link stays one. A device or a pipe (``/dev/stdout``) is
            written to directly.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    make_folder(path.parent)
    partial = _beside(path, f"{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask says; what is written next may have its own idea
        yield partial
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8) or bytes through :func:`atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def atomic_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True, keep: Callable[[], Collection[str]] = tuple) -> Iterator[Path]:
    """A hidden folder to be filled within the block, which then takes the name ``path``.

    What had the name before stays until then, so that both need room for a while; the two change places in one step
    where the system can (Linux), else in two, the first of which is undone where the second fails. An error within the
    block removes the new folder and leaves the old one; a kill leaves a hidden folder, which the next call removes.
    Meanwhile nobody else writes it.

    Args:
        path: the folder to write; made with its parents where absent. A link stays one. An empty folder is replaced,
            but where it is a mount or this process stands in it: then what was made moves into it at the end, and a
            kill meanwhile leaves a part of it, which the next call removes.
        replace: whether a folder that holds something may be replaced.
        keep: names at the top of the old folder that the new one has too, asked for at the end.

    Raises:
        DavaeError: another process writes it, or something is in it that may not be replaced.
    """
    path = path.resolve()
    in_place = path.is_dir() and is_free(path) and (bool(os.listdir(path)) or _must_stay(path))
    if not in_place:
        make_folder(path.parent)
    lock = path / LOCK if in_place else _beside(path, "lock")
    busy = f"{path} is in use: another process writes it; wait for it, stop it, or name another folder"
    with locked(lock, lambda: busy, remove=True):
        _tidy_beside(path)
        if in_place:
            _tidy_inside(path)
        partial = path / _INSIDE if in_place else _beside(path, f"{os.getpid()}.partial")
        try:
            partial.mkdir()
            yield partial
            _carry(path, partial, keep())
            _settle(partial)
            if in_place:
                _move_up(partial, path)
            else:
                _put(partial, path, replace=replace)
        except BaseException:
            if not (in_place and (partial / "names").exists()):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        flush(path if in_place else path.parent)


def save_whole(model: Any, folder: Path) -> Path:
    """``model.save_pretrained`` of diffusers or transformers into a folder that is whole or as before."""
    with atomic_folder(folder) as inside:
        model.save_pretrained(inside)
    return folder


def make_folder(folder: Path) -> Path:
    """Make a folder and those above it where they are absent."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_folder(path: Path) -> None:
    """Remove a folder; a kill halfway leaves no partial folder under its name."""
    removed = _beside(path, "removed")
    path.rename(removed)
    shutil.rmtree(removed)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder that nothing is in."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_file(file: Path) -> None:
    """Remove a file where it is there."""
    file.unlink(missing_ok=True)


def set_aside(file: Path) -> Path:
    """Give a file another name beside, ``NAME.damaged`` or with a number; returns it."""
    for number in range(1, 1000):
        aside = file.with_name(f"{file.name}.damaged{'' if number == 1 else f'-{number}'}")
        if not aside.exists():
            break
    return file.rename(aside)


def copy_file(source: Path, target: Path) -> None:
    """Copy a file's bytes; its mode follows the umask."""
    with source.open("rb") as old, atomic_file(target) as partial, partial.open("wb") as new:
        shutil.copyfileobj(old, new, 2**20)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder that nobody else writes now."""
    for entry in list(folder.iterdir()):
        if entry.name != LOCK and re.fullmatch(r"\..+\.(partial|lock)|\.step-\d+\.removed", entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def contents(folder: Path) -> set[str]:
    """Names in a folder, without davae's own hidden files and what a killed process had begun to put there."""
    names = set(os.listdir(folder)) - {LOCK, MARK, _INSIDE}
    journal = folder / _INSIDE / "names"
    begun = set(json.loads(journal.read_text())) if journal.is_file() else set()
    return {name for name in names - begun if not re.fullmatch(r"\..+\.\d+\.partial", name)}


def is_free(folder: Path) -> bool:
    """Whether a folder is absent, or there is nothing in it."""
    return not folder.exists() or (folder.is_dir() and not contents(folder))


def allow_as_umask(folder: Path) -> None:
    """Give the weight files that were saved into a folder the mode that the umask says: safetensors makes them 0600."""
    private = [file for file in folder.glob("*.safetensors") if stat.S_IMODE(file.stat().st_mode) == 0o600]
    if private:
        probe = _beside(private[0], f"{os.getpid()}.partial")
        probe.touch()
        mode = probe.stat().st_mode
        probe.unlink()
        for file in private:
            file.chmod(mode)


def flush(path: Path) -> None:
    """``fsync`` a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes as 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and bytes of all files in a folder and below."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_hash(file)};".encode())
    return digest.hexdigest()


@contextmanager
def locked(file: Path, in_use: Callable[[], str], *, remove: bool = False) -> Iterator[None]:
    """Within the block no other process holds the lock ``file``; a killed process holds none.

    Args:
        file: made where absent; its folder must exist.
        in_use: what the error says where another process holds it.
        remove: leave no file behind. For locks that nobody waits for.

    Raises:
        DavaeError: another process holds the lock.
    """
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DavaeError(in_use()) from error
    try:
        yield
    finally:
        try:
            if remove:
                with contextlib.suppress(OSError):  # Windows removes no open file
                    file.unlink()
        finally:
            lock.release()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk or the user's quota is full."""
    return _number(error) in (errno.ENOSPC, errno.EDQUOT)


def system_error(error: BaseException) -> str | None:
    """What an error of the system says, in one line: files, disks, networks, memory. None for any other error."""
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in str(error):
        what = "the device's memory" if name == "OutOfMemoryError" else "the memory"
        return f"{what} is not enough ({_one_line(str(error)) or name}): use a smaller batch, image or precision"
    number = _number(error)
    if not isinstance(error, OSError) and number is None:
        return None
    file = getattr(error, "filename", None)
    about = f"{file}: " if file else ""
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"{about}the disk is full; make room and run the same command again"
    return about + (os.strerror(number) if number is not None and number > 0 else _one_line(str(error)) or name)


@contextmanager
def disk_full_as_error(folder: Path, kept: str) -> Iterator[None]:
    """Turn a full disk in the block into a :class:`DavaeError` that says how much space is free.

    Args:
        folder: where files are written.
        kept: what is not lost: a sentence without its full stop.

    Raises:
        DavaeError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise DavaeError(
            f"the disk is full: {free:.1f} MB are free in {folder}. {kept}; make room and run the same command again"
        ) from error


def _number(error: BaseException) -> int | None:
    """The system's number of an error; safetensors, which is written in Rust, has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _must_stay(folder: Path) -> bool:
    """Whether an empty folder cannot be replaced: a mount, one in a folder that is not ours, or where we stand."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        here = folder.parent
    return os.path.ismount(folder) or not os.access(folder.parent, os.W_OK) or here.is_relative_to(folder)


def _put(new: Path, path: Path, *, replace: bool) -> None:
    """Give a finished folder its name, whatever had it before."""
    if is_free(path):
        if path.exists() and os.name == "nt":
            path.rmdir()
        try:
            new.rename(path)  # onto an empty folder too; never onto one that was filled meanwhile
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    if not replace:
        raise DavaeError(f"{path} holds files already, written meanwhile by somebody else: name another folder")
    if not _exchanged(new, path):
        removed = _beside(path, "removed")
        path.rename(removed)
        try:
            new.rename(path)
        except BaseException:
            removed.rename(path)
            raise
        new = removed
    shutil.rmtree(new, ignore_errors=True)


def _exchanged(new: Path, old: Path) -> bool:
    """Let two folders change names in one step; False where the system or the disk cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here = -100  # AT_FDCWD
    return call is not None and call(here, os.fsencode(new), here, os.fsencode(old), _EXCHANGE) == 0


def _carry(old: Path, new: Path, names: Collection[str]) -> None:
    """What the old folder holds besides, into the new one: the same bytes on the disk where it can be."""
    for name in sorted(set(names) - set(os.listdir(new))):
        source = old / name
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, new / name, symlinks=True, copy_function=_same_bytes)
        else:
            _same_bytes(source, new / name)


def _same_bytes(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _tidy_beside(path: Path) -> None:
    """Remove hidden folders of killed processes; a kill between two renames left the only whole one hidden."""
    removed = _beside(path, "removed")
    if removed.exists() and not path.exists():
        removed.rename(path)
    own = re.compile(rf"\.{re.escape(path.name)}\.((\d+\.)?partial|removed)")
    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if own.fullmatch(entry.name) and entry.is_dir():
            shutil.rmtree(entry)


def _tidy_inside(path: Path) -> None:
    """Remove what a killed process was putting into an empty folder."""
    journal = path / _INSIDE / "names"
    for name in json.loads(journal.read_text()) if journal.is_file() else []:
        begun = path / name
        if begun.is_dir():
            shutil.rmtree(begun)
        else:
            begun.unlink(missing_ok=True)
    shutil.rmtree(path / _INSIDE, ignore_errors=True)
    (path / MARK).unlink(missing_ok=True)


def _move_up(partial: Path, path: Path) -> None:
    """What was made, into the folder that must stay; what makes it one that opens comes last."""
    entries = sorted(partial.iterdir(), key=lambda entry: (entry.is_file(), entry.name == "model_index.json"))
    atomic_json(partial / "names", [entry.name for entry in entries])
    for entry in entries:
        entry.rename(path / entry.name)
    shutil.rmtree(partial)


def _settle(folder: Path) -> None:
    """Modes as the umask says, the folder's own being made by it, and everything on the disk."""
    mode = folder.stat().st_mode & 0o666
    for written in folder.rglob("*"):
        if written.is_symlink():
            continue
        if written.is_file() and not written.stat().st_mode & 0o111 and written.stat().st_nlink == 1:
            written.chmod(mode)
        flush(written)
    flush(folder)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")
