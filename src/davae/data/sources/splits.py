"""Holding images out for validation, by their names.

Whether an image is held out depends on a hash of its id alone: not on a seed, not on the other images. Adding
images to a folder moves none of the old ones from one part to the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

from davae.errors import DavaeError

Part = Literal["train", "held_out"]


def choose_part(ids: Sequence[str], hold_out: float, part: Part) -> list[int]:
    """Positions of the ids that belong to ``part``, in their order.

    Args:
        ids: one unique name an image.
        hold_out: below 1 the share of held-out images, from 1 on their number (those with the smallest
            hashes), 0 for none. Where a share comes to no image or to all of them, one image changes sides,
            so that both parts hold something.
        part: which part to return.

    Raises:
        DavaeError: the numbers cannot be met, or there is nothing to hold out.
    """
    if part not in ("train", "held_out"):
        raise DavaeError(f"part is '{part}'; known are train, held_out")
    if hold_out < 0 or (hold_out >= 1 and hold_out != int(hold_out)):
        raise DavaeError(f"hold_out is {hold_out}; give a share below 1 or a whole number of images")
    if hold_out == 0:
        if part == "held_out":
            raise DavaeError("no held-out images: hold_out is 0; set it above 0")
        return list(range(len(ids)))
    order = sorted(range(len(ids)), key=lambda i: _hash(ids[i]))
    if hold_out >= 1:
        count = int(hold_out)
        if count >= len(ids):
            raise DavaeError(f"hold_out is {count} but there are only {len(ids)} images; hold out fewer")
    else:
        threshold = int(hold_out * 2**64)
        count = sum(_hash(name) < threshold for name in ids)
        if len(ids) < 2:
            if part == "held_out":
                raise DavaeError("one image alone: nothing can be held out of it; set hold_out to 0")
            return list(range(len(ids)))
        count = min(max(count, 1), len(ids) - 1)
    return sorted(order[:count] if part == "held_out" else order[count:])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
