"""What a run depends on: the weights it started from and its training images, identified by content.

A path says where something is, not what it is. A checkpoint stores hashes of the given weights and of the names and
sizes of the training images; a run resumes if they are the same, wherever they are now.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.data import ItemDataset
from davae.data.cache import plain_config, value_hash, weights_hash
from davae.errors import DavaeError

logger = logging.getLogger(__name__)
IMAGES = "images"
"""The checkpoint's file with the hashes of the images."""
_SCALES = ("_mean", "_std", "_factor")


def model_hash(module: nn.Module) -> str:
    """A hash of a model's weights and of the latent statistics and scales in its configuration."""
    config = plain_config(getattr(module, "config", None) or {}) if hasattr(module, "register_to_config") else {}
    scales = {key: value for key, value in config.items() if key.endswith(_SCALES) and value is not None}
    return value_hash([weights_hash(module), scales]) if scales else weights_hash(module)


@dataclass(frozen=True)
class Foundations:
    """What a run depends on.

    Attributes:
        weights: hashes by a readable name, such as ``the autoencoder``.
        images: ``names`` and ``contents``, int64 ``[n]``: a hash of each training image's name, and one of name and
            file size, 0 if the size is unknown.
        names: names of the images in the same order.
    """

    weights: Mapping[str, str]
    images: Mapping[str, Tensor]
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, weights: Mapping[str, str], dataset: ItemDataset) -> Foundations:
        """From the hashes of a stage's weights and its training images."""
        sizes = dataset.sizes_by_name()
        names = [_number(name) for name in sizes]
        contents = [_number(f"{name}\0{size}") if size else 0 for name, size in sizes.items()]
        images = {"names": _int64(names), "contents": _int64(contents)}
        return cls(dict(weights), images, tuple(sizes))

    def check(
        self, saved_weights: Mapping[str, str], saved: Mapping[str, Tensor], held_out: set[str], out: Path
    ) -> bool:
        """Compare with a checkpoint.

        Args:
            saved_weights, saved: ``weights`` and ``images`` of the checkpoint.
            held_out: names of images that are held out now; these do not count as gone.
            out: the run directory, for the error.

        Returns:
            Whether the set of images differs in a way that the run may continue with (added or newly held out).

        Raises:
            DavaeError: weights differ, or images are gone or changed; the message lists what.
        """
        found = [
            f"{name}: other weights" for name, value in self.weights.items() if saved_weights.get(name, value) != value
        ]
        names = dict(zip(self.images["names"].tolist(), zip(self.names, self.images["contents"].tolist())))
        away = {_number(name) for name in held_out}
        changed, gone = [], 0
        before = dict(zip(saved["names"].tolist(), saved["contents"].tolist()))
        for number, content in before.items():
            if number not in names:
                gone += number not in away
            elif content and names[number][1] and names[number][1] != content:
                changed.append(names[number][0])
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            found.append(f"the images: {changed[0]}{more} of another size under the same name")
        if gone:
            found.append(f"the images: {gone} of {len(before)} are gone")
        if found:
            raise DavaeError(
                f"{out} cannot go on: what it stands on is not what it began with ({'; '.join(found)}). Put that back, "
                "or start another run with another --out"
            )
        grown = [name for name, _ in names.values() if _number(name) not in before]
        if grown:
            logger.info("%s goes on with %d more images, such as %s", out, len(grown), grown[0])
        return names.keys() != before.keys()


def _number(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def stands_on(values: Mapping[str, Any]) -> Mapping[str, str] | None:
    """The hashes of weights in a checkpoint's plain values; ``None`` if an earlier version wrote it."""
    found = values.get("stands_on")
    return found if isinstance(found, dict) else None
