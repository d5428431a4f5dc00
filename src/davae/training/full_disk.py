"""A full disk, told in one line wherever it is met."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from davae.errors import DavaeError


def is_full_disk(error: Exception) -> bool:
    """Whether an error says that the disk, or a person's share of it, is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return f"os error {errno.ENOSPC}" in str(error) or f"os error {errno.EDQUOT}" in str(error)


@contextmanager
def telling_of_a_full_disk(folder: Path, kept: str) -> Iterator[None]:
    """Within the block a full disk is an error for people.

    Args:
        folder: where is written.
        kept: what is not lost.

    Raises:
        DavaeError: the disk is full.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_full_disk(error):
            raise
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e6
        raise DavaeError(
            f"the disk is full: {free:.1f} MB are free in {folder}. {kept}; make room and run the same command again"
        ) from error
