"""The ``data`` section of a recipe: where images come from, and how they become tensors."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from davae.choices import Crop, StorageDtype
from davae.errors import DavaeError
from davae.import_hooks import plugin_names
from davae.recipes.loop import AT_HOME, MAY_CHANGE, MAY_MOVE, NotNegative, Positive, Section, Weight


def _share_or_number(hold_out: float) -> float:
    if hold_out >= 1 and hold_out != int(hold_out):
        raise ValueError("give a share below 1 or a whole number of images")
    return hold_out


class ImageSettings(Section):
    """Where images come from: the settings of every training."""

    path: Annotated[str, MAY_MOVE] = "procedural"
    """A folder, a data set name or file, WebDataset shards, or ``procedural`` ([data.md](data.md))."""
    crop: Crop = "center"
    """The square in the middle, or one drawn again each time."""
    flip: bool = False
    """Mirror left and right with probability one half."""
    split: Annotated[str, MAY_MOVE] = "train"
    """Split of a data set on the hub."""
    revision: Annotated[str | None, MAY_MOVE] = None
    """A name on the hub: the branch, tag or commit to take; none takes the newest. The run's ``environment.json`` says
    which commit it was, to be pinned here."""
    hold_out: Annotated[Weight, AfterValidator(_share_or_number)] = 0.05
    """Share of the images (below 1) or their number (1 and more) kept for validation; a tenth where that number is more
    than a third of them; 0 keeps none, and nothing is measured."""
    workers: Annotated[NotNegative | None, MAY_CHANGE] = 0
    """Loader processes of each training process; 0 decodes in the training process, ``null`` takes one per processor
    that it has, at most 8."""
    timeout_s: Annotated[Weight, MAY_CHANGE] = 600.0
    """Seconds to wait for a batch before the run stops and names the files being read; 0 waits indefinitely."""


class MoreImages(Section):
    """A further set of images, joined with that of ``data.path``."""

    path: str
    """As ``data.path``; image files, not ``procedural``."""
    split: str = "train"
    """As ``data.split``."""
    revision: str | None = None
    """As ``data.revision``."""
    repeats: Positive = 1
    """As ``data.repeats``."""
    resolution: Positive | None = None
    """Side of its training images in pixels; none takes ``data.resolution``. ``path`` may be that of another set, for
    the same images at several resolutions."""


KEPT_ONCE = (
    "data.cache holds each image once: leave out data.repeats and those of data.more, or set data.cache=null "
    "(data.cache_latents=true keeps the latents in memory)"
)


class DataSettings(ImageSettings):
    """Where images come from and how they become tensors."""

    more: list[MoreImages] = Field(default=[])
    """Further sets of images. Classes of the same name are one class. Held-out images are chosen from the sets at
    ``data.resolution``, and are training images in none."""
    repeats: Positive = 1
    """How often each training image of ``path`` is shown in an epoch: the weight of this set beside others."""
    resolution: Positive = 128
    """Side of the square training image in pixels, at full resolution; that of held-out images and of samples."""
    buckets: bool | list[tuple[Positive, Positive]] = False
    """Aspect-ratio buckets for the training images: ``true`` for sizes of about ``resolution ** 2`` pixels, or
    a list of [width, height] where all sets have one resolution. Held-out images stay square."""
    cache_latents: Annotated[bool, MAY_CHANGE] = False
    """Encode the images once and keep the latents in memory: all of them in the diffusion stage, the base's in the
    autoencoder stage; with ``flip`` those of the mirrored images too. Where ``autoencoder.target`` is ``base`` the
    targets are kept besides, at 6 bytes a pixel; the training of a base from nothing keeps its images, at 3."""
    cache: Annotated[str | None, AT_HOME, MAY_CHANGE] = None
    """Diffusion stage, or a base recipe with ``start_from``: folder that ``davae cache`` wrote; latents and embeddings
    are read from it."""
    cache_dtype: Annotated[StorageDtype, MAY_CHANGE] = "float32"
    """Storage type of a cache; with float32 training gives the same losses as from images."""

    @model_validator(mode="after")
    def _can_be_kept(self) -> DataSettings:
        if self.crop == "random" and self.cache_latents:
            raise ValueError(
                "data.crop=random cuts another part out of an image each time, so data.cache_latents=true cannot "
                "keep its latent; set data.crop=center or data.cache_latents=false"
            )
        return self

    @model_validator(mode="after")
    def _kept_once(self) -> DataSettings:
        if self.cache is not None and self.repeated:
            raise ValueError(KEPT_ONCE)
        return self

    @model_validator(mode="after")
    def _listed_for_one_resolution(self) -> DataSettings:
        if isinstance(self.buckets, list) and len(self.resolutions) > 1:
            raise ValueError(
                "data.buckets: a list of sizes is for one resolution, and sets of data.more have others; set "
                "data.buckets=true, which makes sizes for each"
            )
        return self

    @property
    def resolutions(self) -> list[int]:
        """The resolutions of the training images, each once; that of ``path`` is the first."""
        return list(dict.fromkeys([self.resolution, *(images.resolution or self.resolution for images in self.more)]))

    @property
    def of_one_size(self) -> bool:
        """Whether all training images are squares of one size."""
        return self.buckets is False and len(self.resolutions) == 1

    def reduced(self, factor: int) -> DataSettings:
        """The same images at 1/``factor`` of their resolutions, which must be multiples of it."""
        more = [
            images.model_copy(update={"resolution": images.resolution and images.resolution // factor})
            for images in self.more
        ]
        return self.model_copy(update={"resolution": self.resolution // factor, "more": more})

    @property
    def repeated(self) -> bool:
        """Whether images are shown several times in an epoch."""
        return self.repeats > 1 or any(images.repeats > 1 for images in self.more)


_PROCEDURAL = re.compile(r"procedural(:.*)?")
_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*(:[\w.-]+)?")


def is_procedural(name: str) -> bool:
    """Whether a name stands for rendered scenes: ``procedural`` or ``procedural:LENGTH``."""
    return _PROCEDURAL.fullmatch(name) is not None


def is_on_hub(name: str) -> bool:
    """Whether a name is one on the hub: not a path that exists, or whose parent folder exists."""
    path = Path(name).expanduser()
    local = path.exists() or name.endswith(".tar") or glob.has_magic(name)
    local = local or path.is_absolute() or name.startswith((".", "~")) or ("/" in name and path.parent.is_dir())
    return not local and _HUB_NAME.fullmatch(name) is not None


SOURCES = "davae.sources"
"""Entry points of plug-ins that open data sets: functions of the text after ``NAME://`` and the split."""


def plugin_scheme(name: str) -> str | None:
    """``NAME`` in ``NAME://...`` if a plug-in opens such data sets; none for other names.

    Raises:
        DavaeError: the name has this form and there is no such plug-in.
    """
    scheme, separator, _ = name.partition("://")
    if not separator:
        return None
    known = plugin_names(SOURCES)
    if scheme not in known:
        raise DavaeError(
            f"'{name}': no plug-in opens {scheme}:// (entry points {SOURCES}: {', '.join(known) or 'none'}); download "
            "the images and give their folder, or install the plug-in"
        )
    return scheme


def check_data_paths(data: ImageSettings) -> None:
    """Check that the images of a recipe exist, as :func:`check_data_path`, those of ``data.more`` too.

    Raises:
        DavaeError: as there.
    """
    for images in (data, *getattr(data, "more", ())):
        check_data_path(images.path, images.revision)


def check_data_path(name: str, revision: str | None = None) -> None:
    """Check that a data path exists; a name on the hub is looked up when it is opened.

    Args:
        name: as in ``data.path``, see :func:`davae.data.open_dataset`.
        revision: as in ``data.revision``.

    Raises:
        DavaeError: there is no such folder or file; or a revision is given for what is not on the hub.
    """
    if is_on_hub(name) or (plugin_scheme(name) and revision is None):
        return
    if revision is not None:
        raise DavaeError(f"data.revision is set, but '{name}' is not a name on the hub; only those have revisions")
    known = is_procedural(name) or name.endswith(".tar") or glob.has_magic(name)
    if not known and not Path(name).expanduser().exists():
        raise DavaeError(
            f"no images at '{name}': there is no such folder or file. Give a folder of images, parquet or arrow "
            f"files, WebDataset .tar shards, owner/name of a data set on the Hugging Face hub, or procedural"
        )
