"""Memory that loader processes share with the training, and keep sharing.

A forked process shares its parent's pages until one of both writes to them. Python's garbage collector writes into the
head of every object it looks at: its first full collection, minutes after the start, would give each loader process its
own copy of all objects of the imported libraries, about 140 MB.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def frozen_objects(workers: int) -> Iterator[None]:
    """Within the context the garbage collector leaves alone what exists at its beginning, here and in forks.

    To be entered before ``workers`` processes are forked. Without any, and where objects are frozen already, nothing is
    done.
    """
    if not workers or gc.get_freeze_count():
        yield
        return
    gc.collect()  # what is garbage now would stay
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
