"""Whether a ``data.path`` can be anything, asked before seconds of imports and minutes of loading a base."""

from __future__ import annotations

import glob
import re
from pathlib import Path

from davae.errors import DavaeError

_PROCEDURAL = re.compile(r"procedural(:.*)?")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?")


def is_procedural(name: str) -> bool:
    """Whether a name stands for rendered scenes: ``procedural`` or ``procedural:LENGTH``."""
    return _PROCEDURAL.fullmatch(name) is not None


def is_on_hub(name: str) -> bool:
    """Whether a name can only be one on the hub: what exists on disk, or lies beside what does, comes first."""
    path = Path(name).expanduser()
    local = path.exists() or name.endswith(".tar") or glob.has_magic(name)
    local = (
        local or path.is_absolute() or name.startswith((".", "~")) or ("/" in name and path.parent.is_dir())
    )
    return not local and _HUB_NAME.fullmatch(name) is not None


def check_data_path(name: str, revision: str | None = None) -> None:
    """Refuse a path where nothing is. What is there is opened later, and a name on the hub is looked up then.

    Args:
        name: as in ``data.path``, see :func:`davae.data.open_dataset`.
        revision: as in ``data.revision``.

    Raises:
        DavaeError: there is no such folder or file; or a revision of what has none.
    """
    if is_on_hub(name):
        return
    if revision is not None:
        raise DavaeError(
            f"data.revision is set, but '{name}' is not a name on the hub; only those have revisions"
        )
    known = is_procedural(name) or name.endswith(".tar") or glob.has_magic(name)
    if not known and not Path(name).expanduser().exists():
        raise DavaeError(
            f"no images at '{name}': there is no such folder or file. Give a folder of images, parquet or arrow "
            f"files, WebDataset .tar shards, owner/name of a data set on the Hugging Face hub, or procedural"
        )
