"""Opening autoencoders wherever they lie, and the errors of what is not there, is damaged, or is something else."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import diffusers
import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.placing import saved_dtype


def load_autoencoder(
    folder_or_repo: str | Path, *, dtype: torch.dtype | Literal["saved"] = torch.float32
) -> AutoencoderDA:
    """Open an :class:`AutoencoderDA`, from its folder or from the hub.

    Args:
        folder_or_repo: the folder, or ``user/name``.
        dtype: to read it in; ``saved`` is that of the folder's files (of a name on the hub float32).

    Raises:
        DavaeError: no autoencoder there or one of another class, files that are missing or damaged, or a name that
            the hub does not give.
    """
    place = str(folder_or_repo)
    if Path(place).is_dir() or "/" not in place:
        place = str(autoencoder_folder(Path(place)))
    else:
        place = hub_name("autoencoder", place)
    with opening("autoencoder", place):
        return AutoencoderDA.from_pretrained(place, dtype=saved_dtype(place) if dtype == "saved" else dtype)


def autoencoder_folder(folder: Path) -> Path:
    """The same folder, where it is one of an :class:`AutoencoderDA`.

    Raises:
        DavaeError: it is not; a folder inside that may be meant, a run's or a pipeline's, is named.
    """
    config = folder / "config.json"
    if not config.is_file():
        inside = [
            folder / name for name in ("autoencoder", "vae") if (folder / name / "config.json").is_file()
        ]
        hint = f"; did you mean {inside[0]}?" if inside else ""
        there = "it has no config.json" if folder.is_dir() else "it is a file, and a folder is wanted"
        missing = there if folder.exists() else "there is no such folder"
        raise DavaeError(f"no autoencoder in {folder}: {missing}{hint}")
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise DavaeError(f"no autoencoder in {folder}: {config} is damaged ({error})") from error
    if name != AutoencoderDA.__name__:
        raise DavaeError(
            f"{folder} holds a model of class {name}, and an AutoencoderDA is wanted: "
            "`davae train autoencoder` makes one"
        )
    return folder


def hub_name(what: str, name: str) -> str:
    """The same name, where it can be one of the hub.

    Args:
        what: such as ``pipeline``.
        name: what is no folder on this machine.

    Raises:
        DavaeError: it is a file, or a path that is not there.
    """
    if Path(name).exists():
        raise DavaeError(f"no {what} in {name}: it is a file, and a folder is wanted")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DavaeError(f"no {what} in {name}: there is no such folder") from error
    return name


@contextmanager
def opening(what: str, place: str) -> Iterator[None]:
    """What diffusers raises while ``what`` is opened becomes an error for people; a full disk stays what it is.

    Args:
        what: such as ``pipeline``.
        place: a folder, or a name on the hub.

    Raises:
        DavaeError: files are missing or damaged, a class is not known, or the hub does not answer.
    """
    try:
        yield
    except (OSError, SafetensorError, json.JSONDecodeError, AttributeError) as error:
        unknown_class = str(error).startswith("module diffusers has no attribute")
        if getattr(error, "errno", None) == errno.ENOSPC or (
            isinstance(error, AttributeError) and not unknown_class
        ):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        if unknown_class:
            told = f"the {what} in {place} is of a class that diffusers {diffusers.__version__} does not have"
        elif Path(place).is_dir():
            told = f"the {what} in {place} cannot be read: copy or save it again"
        else:
            told = f"no {what} '{place}': there is no such folder, and the hub does not give it"
        raise DavaeError(f"{told} ({reason})") from error
