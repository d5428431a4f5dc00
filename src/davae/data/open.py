"""Opening the data set that a ``data.path`` names."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Container, Hashable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from davae.choices import Crop
from davae.data.images.buckets import assign_buckets
from davae.data.images.dataset import ImageDataset, JoinedSource, Source
from davae.data.images.decode import UnreadableImage
from davae.data.images.transforms import Size, SquareCrop
from davae.data.scenes import ProceduralScenes
from davae.data.sources.bad_files import check_headers, describe, refuse_if_mostly_bad
from davae.data.sources.facts import METADATA_NAMES
from davae.data.sources.folder import IMAGE_SUFFIXES, FolderSource
from davae.data.sources.scenes import RenderedDataset
from davae.data.sources.tables import TABLE_SUFFIXES, open_hub, open_saved, open_tables
from davae.data.sources.webdataset import ShardSource, find_shards, matching_files
from davae.errors import DavaeError
from davae.import_hooks import plugin
from davae.recipes.data import SOURCES, MoreImages, check_data_path, is_on_hub, is_procedural, plugin_scheme
from davae.runtime.console import shown

logger = logging.getLogger(__name__)

PROCEDURAL_LENGTH = 10_000
"""Number of scenes in ``procedural`` if no length is given."""


def open_dataset(
    path_or_name: str | Path,
    *,
    resolution: int,
    crop: Crop = "center",
    flip: bool = False,
    seed: int = 0,
    split: str | None = "train",
    hold_out: float = 0,
    tenth_of_few: bool = False,
    part: Part = "train",
    min_size: int | None = None,
    buckets: Sequence[Size] | Mapping[int, Sequence[Size]] | None = None,
    revision: str | None = None,
    repeats: int = 1,
    more: Sequence[MoreImages] = (),
    quiet: bool = False,
) -> ImageDataset | RenderedDataset:
    """Open a set of images for training or validation.

    ``path_or_name`` may be

    * a folder of images, at any depth (class = parent folder, captions beside);
    * a folder that ``datasets`` saved, ``.parquet`` or ``.arrow`` files, or a folder of them;
    * WebDataset ``.tar`` shards: a folder, a file, or a pattern such as ``shards/{000..015}.tar``;
    * ``owner/name`` on the Hugging Face hub;
    * ``procedural`` or ``procedural:LENGTH``: rendered scenes, those held out from another seed;
    * ``NAME://...``: what a plug-in of that name opens (``davae.sources``).

    Args:
        path_or_name: as above; what exists on disk comes first.
        resolution: side of the square images in pixels.
        crop: ``center`` or ``random``, see :class:`SquareCrop`. Procedural scenes are rendered square.
        flip: mirror half of the images.
        seed: of crops and flips. It changes neither the order nor what is held out.
        split: which of several splits; ``None`` takes all images of a folder that consists of splits.
        hold_out: share (below 1) or number of images kept for validation, chosen by a hash of their names.
        tenth_of_few: hold out a tenth where that number is more than a third of the images, as recipes do.
        part: ``train`` or ``held_out``.
        min_size: images with a shorter side are skipped; by default a quarter of their resolution.
        buckets: sizes (width, height), with several resolutions those of each; each image takes the one with the
            nearest aspect ratio. By default all are square; procedural scenes always are.
        revision: of a name on the hub: branch, tag or commit; by default the newest.
        repeats: how often each training image is in the data set.
        more: further sets of images to be joined with this one, each with its own ``repeats`` and ``resolution``. Only
            sets at ``resolution`` have held-out images, which are left out of all of them.
        quiet: do not log what was found, for a set that is opened again.

    Returns:
        A map-style data set of items (see :mod:`davae.data.images.protocol`) with ``classes`` and ``skipped``, the
        files already found to be unusable.

    Raises:
        DavaeError: nothing there, no images in it, more than half of them unusable, or a revision of what has none.
    """
    transform = SquareCrop(resolution, crop, flip)
    name = str(path_or_name)
    if (more or repeats > 1) and any(is_procedural(place) for place in (name, *(images.path for images in more))):
        raise DavaeError("procedural scenes cannot be joined with other images, nor repeated: leave data.more out")
    if is_procedural(name) and revision is None:
        return RenderedDataset(_procedural(name, resolution, hold_out, part), flip=flip, seed=seed)
    source = find_source(path_or_name, split, revision)
    times, sides = [repeats] * len(source), [resolution] * len(source)
    files: list[Hashable] = list(range(len(source)))
    if more:
        files = _files(source, (name, split, revision))
        others = [find_source(images.path, images.split, images.revision) for images in more]
        for images, other in zip(more, others):
            times += [images.repeats] * len(other)
            sides += [images.resolution or resolution] * len(other)
            files += _files(other, (images.path, images.split, images.revision))
        source = JoinedSource([source, *others])
    shortest = [max(1, side // 4 if min_size is None else min_size) for side in sides]
    told = part == "train" and not quiet  # once is enough when both parts are opened
    bad = check_headers(source, min_sizes=shortest, sides=sides if told else ())
    skipped = [(source.id(i), reason) for i, reason in bad.items()]
    refuse_if_mostly_bad(skipped, len(source), source.name)
    if told:
        line = source.summary
        empty = _classes_without_images(source, bad) if bad and source.classes else []
        if empty:
            line += f"; classes of which no image can be used: {', '.join(empty)}"
        logger.info("%s: %s", shown(source.name), shown(line))
        if source.problems:
            logger.warning("%s: %s", source.name, describe(source.problems, one="problem", many="problems"))
    good = [i for i in range(len(source)) if i not in bad]
    first: dict[Hashable, int] = {}
    for i in good:
        if sides[i] == resolution:
            first.setdefault(files[i], i)
    once = list(first.values())
    if tenth_of_few and hold_out >= 1 and 3 * hold_out > len(once):
        if told:
            words = "%s: hold_out=%g is more than a third of its %d images, so about a tenth is held out (hold_out=0.1)"
            logger.info(words, shown(source.name), hold_out, len(once))
        hold_out = 0.1
    indices = [once[i] for i in choose_part([source.id(i) for i in once], hold_out, "held_out")]
    if part == "train":
        unseen = {files[i] for i in indices}
        indices = [index for index in good if files[index] not in unseen for _ in range(times[index])]
    sizes, bucket_of = None, None
    if buckets is not None or (part == "train" and len({*sides}) > 1):
        by_side = buckets if isinstance(buckets, Mapping) else {resolution: buckets} if buckets is not None else {}
        of_each = {side: by_side.get(side, [(side, side)]) for side in dict.fromkeys(sides)}
        sizes, bucket_of = assign_buckets(source, indices, [sides[i] for i in indices], of_each)
    return ImageDataset(
        source,
        indices,
        transform,
        seed=seed,
        min_size=shortest if more else max(shortest, default=1),
        skipped=skipped,
        sizes=sizes,
        bucket_of=bucket_of,
    )


def _files(source: Source, place: tuple[str, str | None, str | None]) -> list[Hashable]:
    """What image file each of a source's is, to know it again in another set: its path, else its name in the source.

    Args:
        source: a set.
        place: path, split and revision that it was opened with.
    """
    if isinstance(source, FolderSource):
        root = str(source.root.resolve())
        return [os.path.join(root, source.id(index)) for index in range(len(source))]
    return [(place, source.id(index)) for index in range(len(source))]


def _classes_without_images(source: Source, bad: Container[int]) -> list[str]:
    """Names of the classes whose images are all bad; they keep their numbers."""
    left: dict[int, bool] = {}
    for index in range(len(source)):
        with suppress(UnreadableImage):  # met again, and counted, when the image is read
            label = source.facts(index).label
            left[label] = left.get(label, False) or index not in bad
    return [name for number, name in enumerate(source.classes) if left.get(number) is False]


def find_source(path_or_name: str | Path, split: str | None = "train", revision: str | None = None) -> Source:
    """Recognise a path, pattern or hub name and open its source.

    Raises:
        DavaeError: it is of no known kind (says what was looked for), or has a revision but is not on the hub.
    """
    name = str(path_or_name)
    path = Path(name).expanduser()
    check_data_path(name, revision)
    if scheme := plugin_scheme(name):
        source: Source = plugin(SOURCES, scheme)(name.partition("://")[2], split)
        return source
    if is_on_hub(name):
        return open_hub(name, split, revision)
    if path.is_dir():
        return _in_folder(path, split)
    if path.is_file():
        return _from_files([path], name)
    if name.lower().endswith(".tar"):
        return ShardSource(find_shards(str(path)), name)
    files = matching_files(str(path))
    if not files:
        raise DavaeError(f"no file matches {name}")
    return _from_files(files, name)


def _in_folder(folder: Path, split: str | None) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return open_saved(folder, split)
    names = [p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    if not any(p.suffix.lower() in IMAGE_SUFFIXES for p in names):
        for suffixes in (frozenset({".tar"}), TABLE_SUFFIXES):
            files = sorted(p for p in names if p.suffix.lower() in suffixes and p.name.lower() not in METADATA_NAMES)
            if files:
                return _from_files(files, str(folder))
    return FolderSource(folder, split)


def _from_files(files: list[Path], name: str) -> Source:
    strange = next((f for f in files if f.exists() and not f.is_file()), None)
    if strange is not None:
        raise DavaeError(f"{strange} is a folder, a pipe or a device, not a file")
    suffixes = {f.suffix.lower() for f in files}
    if suffixes == {".tar"}:
        return ShardSource(files, name)
    if suffixes <= TABLE_SUFFIXES:
        return open_tables(files, name)
    raise DavaeError(
        f"'{name}' is neither a .tar shard nor a .parquet or .arrow table ({', '.join(sorted(suffixes))}); "
        f"to train on image files, give their folder"
    )


def _procedural(name: str, resolution: int, hold_out: float, part: Part) -> ProceduralScenes:
    _, colon, text = name.partition(":")
    if colon and not (text.isdecimal() and int(text) > 0):
        raise DavaeError(f"'{name}': the length must be a positive whole number, as in procedural:5000")
    length = int(text) if colon else PROCEDURAL_LENGTH
    # Scenes are unlimited: held-out ones come from another seed, not out of the training set.
    if part == "train":
        return ProceduralScenes(length, resolution, seed=0)
    count = int(hold_out) if hold_out >= 1 or not hold_out else max(1, round(hold_out * length))
    return ProceduralScenes(count, resolution, seed=1)


Part = Literal["train", "held_out"]


def choose_part(ids: Sequence[str], hold_out: float, part: Part) -> list[int]:
    """Positions of the ids that belong to ``part``, in their order.

    Args:
        ids: one unique name per image.
        hold_out: below 1 the share of held-out images, from 1 on their number (those with the smallest
            hashes), 0 for none. If a share selects no image or all of them, one image changes sides,
            so that neither part is empty; a single image is used for training.
        part: which part to return.

    Raises:
        DavaeError: the numbers cannot be met.
    """
    if part not in ("train", "held_out"):
        raise DavaeError(f"part is '{part}'; known are train, held_out")
    if hold_out < 0 or (hold_out >= 1 and hold_out != int(hold_out)):
        raise DavaeError(f"hold_out is {hold_out}; give a share below 1 or a whole number of images")
    if hold_out == 0 or (hold_out < 1 and len(ids) < 2):
        return list(range(len(ids))) if part == "train" else []
    order = sorted(range(len(ids)), key=lambda i: _hash(ids[i]))
    if hold_out >= 1:
        count = int(hold_out)
        if count >= len(ids):
            raise DavaeError(
                f"hold_out is {count} and there are only {len(ids)} images: set it to "
                f"{f'at most {len(ids) - 1}' if len(ids) > 1 else '0, for no validation'}"
            )
    else:
        threshold = int(hold_out * 2**64)
        count = sum(_hash(name) < threshold for name in ids)
        count = min(max(count, 1), len(ids) - 1)
    return sorted(order[:count] if part == "held_out" else order[count:])


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
