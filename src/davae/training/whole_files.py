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
        path: the folder to write; made with its parents where absent. A link stays one.
    """
    path = path.resolve()
    partial, removed = _beside(path, "partial"), _beside(path, "removed")
    for leftover in (partial, removed):
        if leftover.exists():
            shutil.rmtree(leftover)
    try:
        partial.mkdir(parents=True)
        yield partial
        for written in partial.rglob("*"):
            flush(written)
        flush(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():  # a folder cannot be replaced in one go; between these two lines the name is free
        path.rename(removed)
    partial.rename(path)
    flush(path.parent)
    shutil.rmtree(removed, ignore_errors=True)


def _beside(path: Path, kind: str) -> Path:
    return path.with_name(f".{path.name}.{kind}")
