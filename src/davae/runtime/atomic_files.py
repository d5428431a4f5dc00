"""Files and folders that are complete or absent, whatever ends the process: a kill, a full disk, a power cut.

They are written next to their destination under a hidden name, flushed to disk and then renamed. Without the flush, the
rename may reach the disk before the data, and a power cut leaves an empty file. davae creates, renames and removes
files and folders only here, with modes that follow the umask; :mod:`davae.runtime.places` decides whether a folder may
be written. Also here: locks, SHA-256 hashes, and system errors as one line.
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
from davae.runtime.text_files import whole_text

LOCK, MARK = ".davae.lock", ".davae"
"""Files in folders that are written incrementally: the lock, and the folder's kind."""
_INSIDE = ".davae.partial"
"""Hidden folder in an empty folder that cannot be replaced; its file ``names`` lists what is being moved up."""
_EXCHANGE = 2  # RENAME_EXCHANGE of Linux's renameat2


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a hidden path to write to; when the block ends, the file is renamed to ``path``.

    Until then an existing file stays as it is. An exception in the block removes the hidden file; a kill leaves it. Its
    name contains the process id, so that several processes may write the same file; the last one wins.

    Args:
        path: the file; its folder is created if absent. Symbolic links are followed. A device or a pipe
            (``/dev/stdout``) is written to directly.
    """
    path = Path(os.path.realpath(path))  # `resolve` raises for links in a circle
    if path.exists() and not path.is_file():
        yield path
        return
    make_folder(path.parent)
    partial = _beside(path, f"{os.getpid()}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode  # by the umask; the writer may set another one
        yield partial
        partial.chmod(mode)
        flush(partial)
        partial.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(partial)):
            error.filename = str(path)  # a full disk names no file
        partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write text (as UTF-8, see :func:`whole_text`) or bytes through :func:`atomic_file`."""
    with atomic_file(path) as partial:
        partial.write_bytes(whole_text(content).encode() if isinstance(content, str) else content)


def atomic_json(path: Path, value: Any) -> None:
    """Write plain values as indented JSON."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True, keep: Callable[[], Collection[str]] = tuple) -> Iterator[Path]:
    """Yield a hidden folder to fill; when the block ends, the folder is renamed to ``path``.

    An existing folder stays until then, so both need disk space for a while. They are exchanged atomically if the
    system can (Linux), else by two renames, the first of which is undone if the second fails. An exception in the block
    removes the new folder and leaves the old one; a kill leaves a hidden folder, which the next call removes. A lock
    keeps other processes from writing the folder meanwhile.

    Args:
        path: the folder to write, created with its parents if absent. Symbolic links are followed. An empty folder is
            replaced unless it must stay (a mount, the working directory, an unwritable parent): then the entries are
            moved into it at the end, and a kill meanwhile leaves some of them, which the next call removes.
        replace: whether a folder that is not empty may be replaced.
        keep: names in the old folder to carry over into the new one; called at the end.

    Raises:
        DavaeError: another process writes the folder, or it is not empty and may not be replaced.
    """
    path = Path(os.path.realpath(path))
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
    """``model.save_pretrained`` through :func:`atomic_folder`; returns the folder."""
    with atomic_folder(folder) as inside:
        model.save_pretrained(inside)
    return folder


def make_folder(folder: Path) -> Path:
    """Create a folder and its parents if absent; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_folder(path: Path) -> None:
    """Remove a folder; a kill halfway leaves no partial folder under its name."""
    removed = _beside(path, "removed")
    path.rename(removed)
    shutil.rmtree(removed)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder if it is empty."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove_file(file: Path) -> None:
    """Remove a file if it exists."""
    file.unlink(missing_ok=True)


def set_aside(file: Path) -> Path:
    """Rename a file to ``NAME.damaged``, or with a number appended; returns the new path."""
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
    """Remove what killed processes left half-written in a folder; no other process may be writing it."""
    for entry in list(folder.iterdir()):
        if entry.name != LOCK and re.fullmatch(r"\..+\.(partial|lock)|\.step-\d+\.removed", entry.name):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def contents(folder: Path) -> set[str]:
    """Names in a folder, without davae's own hidden files and what a killed process had started to move there."""
    names = set(os.listdir(folder)) - {LOCK, MARK, _INSIDE}
    return {name for name in names - _begun(folder) if not re.fullmatch(r"\..+\.\d+\.partial", name)}


def _begun(folder: Path) -> set[str]:
    """Names of what a killed process had started to move into an empty folder; a name that leads elsewhere is none."""
    try:
        found = json.loads((folder / _INSIDE / "names").read_bytes())
    except (OSError, ValueError):
        return set()
    names = found if isinstance(found, list) else []
    return {name for name in names if isinstance(name, str) and name not in ("", ".", "..") and name == Path(name).name}


def is_free(folder: Path) -> bool:
    """Whether a folder is absent or has no :func:`contents`."""
    return not folder.exists() or (folder.is_dir() and not contents(folder))


def allow_as_umask(folder: Path) -> None:
    """Give the weight files in a folder the mode of the umask; safetensors creates them with 0600."""
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
    """SHA-256 over the relative names and bytes of all files in a folder, recursively, as hexadecimal digits."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()} {file_hash(file)};".encode())
    return digest.hexdigest()


@contextmanager
def locked(file: Path, in_use: Callable[[], str], *, remove: bool = False) -> Iterator[None]:
    """Hold the lock ``file`` for the duration of the block; a killed process holds no lock.

    Args:
        file: created if absent; its folder must exist.
        in_use: makes the error message if another process holds the lock.
        remove: remove the file at the end; only for locks that no process waits for.

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
                with contextlib.suppress(OSError):  # Windows cannot remove an open file
                    file.unlink()
        finally:
            lock.release()


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that the disk or the user's quota is full."""
    return _number(error) in (errno.ENOSPC, errno.EDQUOT)


def system_error(error: BaseException) -> str | None:
    """The message, in one line, of a system error (files, disks, networks, memory); ``None`` for any other error."""
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
    """The ``errno`` of an error; safetensors, written in Rust, has it only in the message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(found[1]) if found else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _must_stay(folder: Path) -> bool:
    """Whether an empty folder cannot be replaced: a mount, one with an unwritable parent, or the working directory."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        here = folder.parent
    return os.path.ismount(folder) or not os.access(folder.parent, os.W_OK) or here.is_relative_to(folder)


def _put(new: Path, path: Path, *, replace: bool) -> None:
    """Rename a finished folder to ``path``, in place of an existing one."""
    if is_free(path):
        if path.exists() and os.name == "nt":
            path.rmdir()
        try:
            new.rename(path)  # replaces an empty folder, never one that was filled meanwhile
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
    """Exchange two folders atomically; false if the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    here = -100  # AT_FDCWD
    return call is not None and call(here, os.fsencode(new), here, os.fsencode(old), _EXCHANGE) == 0


def _carry(old: Path, new: Path, names: Collection[str]) -> None:
    """Carry ``names`` of the old folder over into the new one, as hard links if possible."""
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
    """Remove hidden folders of killed processes; restore the old one after a kill between two renames."""
    removed = _beside(path, "removed")
    if removed.exists() and not path.exists():
        removed.rename(path)
    own = re.compile(rf"\.{re.escape(path.name)}\.((\d+\.)?partial|removed)")
    for entry in list(path.parent.iterdir()) if path.parent.is_dir() else []:
        if own.fullmatch(entry.name) and entry.is_dir():
            shutil.rmtree(entry)


def _tidy_inside(path: Path) -> None:
    """Remove what a killed process had moved into an empty folder."""
    for name in _begun(path):
        begun = path / name
        if begun.is_dir() and not begun.is_symlink():
            shutil.rmtree(begun)
        else:
            begun.unlink(missing_ok=True)
    shutil.rmtree(path / _INSIDE, ignore_errors=True)
    (path / MARK).unlink(missing_ok=True)


def _move_up(partial: Path, path: Path) -> None:
    """Move the entries into the folder that must stay; files last, ``model_index.json`` last of all."""
    entries = sorted(partial.iterdir(), key=lambda entry: (entry.is_file(), entry.name == "model_index.json"))
    atomic_json(partial / "names", [entry.name for entry in entries])
    for entry in entries:
        entry.rename(path / entry.name)
    shutil.rmtree(partial)


def _settle(folder: Path) -> None:
    """Set the modes of the umask, taken from the folder's own, and flush everything to disk."""
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
