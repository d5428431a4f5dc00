"""Files and folders that are whole or absent, whatever ends the process: a kill, a full disk, a power cut.

They are written beside under a hidden name, flushed to disk and then renamed: a rename may reach the disk before the
bytes do, so a file that was only renamed can be empty after a power cut.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from davae.data.cache.shards import flush


def write_whole(path: Path, text: str) -> None:
    """Write a text file; until it has its name, what was there before stays."""
    partial = _beside(path, "partial")
    partial.write_text(text)
    flush(partial)
    partial.replace(path)
    flush(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
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
