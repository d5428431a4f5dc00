"""Files and folders that are complete or absent, whatever ends the process: a kill, a full disk, a power cut.

They are written beside under a hidden name, flushed to disk and then renamed: a rename may reach the disk before the
bytes do, so a file that was only renamed can be empty after a power cut. Here stand also locks, the SHA-256 of a file,
and the error for a full disk.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from davae.errors import DavaeError


@contextmanager
def atomic_file(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A hidden path to be written within the block, which then takes the name ``path``.

    Until then what was there before stays. An error within the block removes the hidden file; a kill leaves it, and the
    next call overwrites it.

    Args:
        path: the file; its folder must exist. A link stays one. A device or a pipe (``/dev/stdout``) is written to
            directly.
        shared: processes that know nothing of each other may write the file at the same time, each under a hidden name
            of its own; a killed one then leaves a file that nobody overwrites.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        yield path
        return
    partial = _beside(path, f"{os.getpid()}.partial" if shared else "partial")
    try:
        yield partial
        flush(partial)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)
    flush(path.parent)


def atomic_write(path: Path, content: str | bytes, *, shared: bool = False) -> None:
    """Write text (UTF-8) or bytes as :func:`atomic_file` does."""
    with atomic_file(path, shared=shared) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def atomic_json(path: Path, value: Any) -> None:
    """Write plain values as JSON, one a line."""
    atomic_write(path, json.dumps(value, indent=1) + "\n")


def atomic_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors of any device as a safetensors file."""
    with atomic_file(path) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A hidden folder to be filled within the block, which then takes the name ``path``.

    What had the name before stays until then, so that both need room for a while. An error within the block removes
    the new folder and leaves the old one; a kill leaves a hidden folder, which the next call removes.

    Args:
        path: the folder to write; made with its parents where absent. A link stays one. An empty folder is not replaced
            but filled at the end.
    """
    path = path.resolve()
    if path.is_dir() and not any(path.iterdir()):  # it may be a mount, or where somebody's shell stands
        with _filled(path) as inside:
            yield inside
        return
    partial, removed = _beside(path, "partial"), _beside(path, "removed")
    if removed.exists() and not path.exists():  # a kill came between the two renames below
        removed.rename(path)
    for leftover in (partial, removed):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        partial.mkdir(parents=True)
        yield partial
        _flush_all(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():  # a folder cannot be replaced in one go; between these two lines the name is free
        path.rename(removed)
    partial.rename(path)
    flush(path.parent)
    shutil.rmtree(removed, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a kill in the middle leaves no half of it under its name."""
    removed = _beside(path, "removed")
    path.rename(removed)
    shutil.rmtree(removed)


def flush(path: Path) -> None:
    """Ask the operating system to put a file, or a folder's entries, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's bytes, 64 hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(file: Path, in_use: Callable[[], str]) -> Iterator[None]:
    """Within the block no other process holds the lock ``file``; a killed process leaves no lock behind.

    Args:
        file: made where absent; its folder must exist.
        in_use: what the error says where another process holds it.

    Raises:
        DavaeError: another process holds it.
    """
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise DavaeError(in_use()) from error
    try:
        yield
    finally:
        lock.release()


def is_disk_full(error: Exception) -> bool:
    """Whether an error says that the disk, or a person's share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)


@contextmanager
def disk_full_as_error(folder: Path, kept: str) -> Iterator[None]:
    """Within the block a full disk is a :class:`DavaeError` that says how much is free.

    Args:
        folder: where files are written.
        kept: what is not lost, a sentence without its full stop.

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


@contextmanager
def _filled(path: Path) -> Iterator[Path]:
    """A hidden folder within the empty ``path``, whose entries move up at the end."""
    partial = path / ".partial"
    partial.mkdir()
    try:
        yield partial
        _flush_all(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for entry in sorted(partial.iterdir()):
        entry.rename(path / entry.name)
    partial.rmdir()
    flush(path)


def _flush_all(folder: Path) -> None:
    for written in folder.rglob("*"):
        flush(written)
    flush(folder)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")
