"""Unusable image files: found early if that is cheap, counted, and listed at the end.

A few bad files do not stop a training; if more than half are bad, that is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial

from torch.utils.data import Dataset

from davae.data.images.dataset import Source, read_file
from davae.data.images.decode import UnreadableImage, check_header
from davae.data.images.protocol import Item, Skip, as_item_dataset
from davae.data.sources.folder import HEADER_CHECK_LIMIT
from davae.errors import DavaeError
from davae.runtime.console import shown

logger = logging.getLogger(__name__)

_NAMED = 20


def check_headers(source: Source, *, min_sizes: Sequence[int], sides: Sequence[int] = ()) -> dict[int, str]:
    """Find the images of a source that are unusable according to their headers.

    Args:
        source: the images.
        min_sizes: shortest side that is accepted, of each image.
        sides: those that images are resized to; how many are smaller, and will be enlarged, is logged.

    Returns:
        Reasons by position in the source.
    """
    bad: dict[int, str] = {}
    if len(source) > HEADER_CHECK_LIMIT:
        logger.info("%s: %d images; unreadable ones are found when they are read", source.name, len(source))
        return bad
    enlarged = 0
    for index in range(len(source)):
        try:
            shorter = min(read_file(source, index, partial(check_header, min_size=min_sizes[index])))
            enlarged += bool(sides) and shorter < sides[index]
        except UnreadableImage as error:
            bad[index] = error.reason
    if enlarged:
        logger.warning(
            "%s: %d of %d images are smaller than %s pixels and are enlarged; they contain no fine detail",
            source.name,
            enlarged,
            len(source),
            " or ".join(map(str, dict.fromkeys(sides))),
        )
    return bad


def describe(skips: Sequence[Skip], *, one: str = "file was skipped", many: str = "files were skipped") -> str:
    """Readable text: how many, the first twenty by name and reason, then how many more."""
    if not skips:
        return f"no {one}"
    lines = [f"{len(skips)} {one if len(skips) == 1 else many}:"]
    lines += [f"  {shown(name)}: {reason}" for name, reason in skips[:_NAMED]]
    if len(skips) > _NAMED:
        lines.append(f"  and {len(skips) - _NAMED} more")
    return "\n".join(lines)


def refuse_if_mostly_bad(skips: Sequence[Skip], total: int, where: str = "the data set") -> None:
    """Raise an error if more than half of ``total`` files are unusable.

    Raises:
        DavaeError: names the first of them.
    """
    if 2 * len(skips) > total:
        raise DavaeError(
            f"{len(skips)} of {total} images of {where} cannot be used, more than half of them; "
            "repair or remove them. Images whose shorter side is below a quarter of the resolution are too small: for "
            f"them set a lower resolution (a recipe's data.resolution). {describe(skips)}"
        )


class SkipLedger:
    """The images that a training skipped, each counted once.

    It starts empty when a training starts or resumes, since files may have been repaired.

    Args:
        total: number of image files, skipped ones included.
        known: files skipped when the data set was opened.
    """

    def __init__(self, total: int, known: Iterable[Skip] = ()) -> None:
        self.total = total
        self._reasons: dict[str, str] = dict(known)

    @classmethod
    def for_dataset(cls, dataset: Dataset[Item]) -> SkipLedger:
        """A ledger that starts with what ``open_dataset`` skipped (``dataset.skipped``), if anything."""
        images = as_item_dataset(dataset)
        return cls(len(images) + len(images.skipped), images.skipped)

    @property
    def count(self) -> int:
        """Number of distinct skipped files."""
        return len(self._reasons)

    @property
    def entries(self) -> list[Skip]:
        """``(id, reason)`` by name."""
        return sorted(self._reasons.items())

    def add(self, skipped: Iterable[Sequence[str]]) -> None:
        """Add the ``skipped`` entries of a batch, or those of another process.

        Raises:
            DavaeError: more than half of the files are now bad.
        """
        before = self.count
        for name, reason in skipped:
            self._reasons.setdefault(name, reason)
        if self.count > before:
            self.check()

    def check(self) -> None:
        """Raise a DavaeError if more than half of the files are bad."""
        refuse_if_mostly_bad(self.entries, self.total)

    def summary(self) -> str:
        """Readable text: the first twenty files by name and reason, then how many more."""
        return describe(self.entries)
