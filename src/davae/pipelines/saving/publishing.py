"""What may be published: the files that a saved model consists of, and texts without private paths."""

import logging
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from davae.errors import DavaeError
from davae.pipelines.saving.opening import LAYERS_FILE
from davae.recipes.presets import find_preset
from davae.runtime.atomic_files import atomic_json, copy_file
from davae.runtime.text_files import read_json, read_object

logger = logging.getLogger(__name__)

_PRIVATE = r"(?:file:(?://)?|~\w*|[A-Za-z]:(?=[\\/])|\.\.(?=[\\/]))?"
_IS_PATH = re.compile(rf"{_PRIVATE}[\\/].*|~[\\/]?.*", re.DOTALL)
_PART = r"[^\s'\"\\/,;:()\[\]{}<>|=]+"
_PLACES = re.compile(
    r"(?P<scheme>\b(?!file:)[a-z][\w+.-]+://)(?:[^\s/'\"]*@)?(?P<rest>[^\s'\"?#]*)[^\s'\"]*"
    rf"|(?P<quote>['\"])(?P<path>{_PRIVATE}[\\/][^'\"\n]*)(?P=quote)"
    rf"|(?<![\w/\\.~-])(?:~\w+|{_PRIVATE}[\\/]+{_PART})[\\/]+(?:{_PART}[\\/]+)*(?:{_PART})?"
)
_PIPELINE_FILES = re.compile(r"model_index\.json|pipeline\.py")
_ADAPTER_FILES = re.compile(rf"{re.escape(LAYERS_FILE)}|pytorch_lora_weights\.safetensors")
_MODEL_FILES = re.compile(
    r"config\.json|davae\.py|generation_config\.json|scheduler_config\.json|(pre|video_pre)?processor_config\.json"
    r"|(diffusion_pytorch_)?model(\.[\w-]+)?(-\d+-of-\d+)?\.safetensors(\.index(\.[\w-]+)?\.json)?"
    r"|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json|normalizer\.json"
    r"|vocab\.(json|txt)|merges\.txt|s(entence)?piece(\.bpe)?\.model|chat_template\.(json|jinja)"
)
_OF_WORDS = ("tokenizer.json", "vocab.json", "added_tokens.json")  # a token may look like a path


def public_name(name: str) -> str:
    """A name on the hub, that of a bundled configuration too; for a local folder the last part of its path."""
    if (preset := find_preset(name)) is not None:
        return preset.name
    is_folder = _IS_PATH.fullmatch(name) or re.search(r"\\|/.*/|^\.", name) or (name and Path(name).exists())
    return _last_part(_PLACES.sub(_public_place, name)) if is_folder else name


def public_text(text: str) -> str:
    """A text with absolute paths, and paths that start with ``~`` or ``..``, shortened to their last part.

    Addresses keep neither a user or password before the host nor a query, which may hold a token.
    """
    return _last_part(text) if _IS_PATH.fullmatch(text) and "\n" not in text else _PLACES.sub(_public_place, text)


def _public_place(found: re.Match[str]) -> str:
    if found["scheme"]:
        return found["scheme"] + found["rest"]
    quote = found["quote"] or ""
    return f"{quote}{_last_part(found['path'] or found[0])}{quote}"


def public_values(value: Any) -> Any:
    """Nested plain values with :func:`public_text` applied to each string."""
    if isinstance(value, str):
        return public_text(value)
    if isinstance(value, dict):
        return {key: public_values(inner) for key, inner in value.items()}
    return [public_values(inner) for inner in value] if isinstance(value, list | tuple) else value


def public_command(command: str) -> str:
    """A command with :func:`public_text` applied to each word, and to the value of ``key=value``."""
    try:
        words = shlex.split(command)
    except ValueError:
        return public_text(command)
    cut = []
    for word in words:
        key, equals, value = word.partition("=")
        cut.append(f"{key}={public_text(value)}" if equals and not _IS_PATH.fullmatch(key) else public_text(word))
    return command if cut == words else shlex.join(cut)


def _last_part(path: str) -> str:
    return re.split(r"[\\/]+", path.rstrip("\\/"))[-1]


def copy_model(source: Path, target: Path) -> None:
    """Copy a saved pipeline, autoencoder or adapters: only the files that their class reads.

    Configurations record their origin by :func:`public_name`. The names of omitted files are logged.

    Raises:
        DavaeError: one of the folders, or something in it, is a link, or a JSON file is not valid.
    """
    kept = list(_files(source))
    for path in kept:
        target_file = target / path.relative_to(source)
        copy_file(path, target_file)
        cut_names(target_file)
    others = {path for path in source.rglob("*") if path.is_file()} - set(kept)
    if others:
        names = ", ".join(sorted(path.relative_to(source).as_posix() for path in others))
        logger.info("left out of the copy of %s, because the model does not read them: %s", source, names)


def _files(folder: Path) -> Iterator[Path]:
    """The files that a model's class reads from its folder; a pipeline's own first, then its components'."""
    parts: list[str] = []
    if (folder / "model_index.json").is_file():
        own = _PIPELINE_FILES
        index = read_object(folder / "model_index.json")
        parts = sorted(key for key in index if not key.startswith("_"))
    else:
        own = _ADAPTER_FILES if (folder / LAYERS_FILE).is_file() else _MODEL_FILES
    yield from _matching(folder, own)
    for part in parts:
        if Path(part).name == part and (folder / part).is_dir():
            yield from _matching(folder / part, _MODEL_FILES)


def _matching(folder: Path, names: re.Pattern[str]) -> Iterator[Path]:
    refuse_links(folder)
    yield from sorted(path for path in folder.iterdir() if path.is_file() and names.fullmatch(path.name))


def refuse_links(folder: Path) -> None:
    """Refuse links in a folder to be copied, which could lead to files elsewhere.

    Raises:
        DavaeError: the folder, or something in it, is a link.
    """
    for path in (folder, *sorted(folder.iterdir())):
        if path.is_symlink():
            raise DavaeError(
                f"{path} is a link to {path.readlink()}: only files in the folder itself are copied. Replace it by a "
                "copy of its target"
            )


def cut_names(file: Path) -> None:
    """Shorten the recorded origin (``*name_or_path``) in a JSON file by :func:`public_name`; else do nothing."""
    if file.suffix != ".json" or file.name in _OF_WORDS:
        return
    try:
        values = read_json(file)
    except DavaeError as error:
        raise DavaeError(f"{error}: it is not handed on") from error
    cut = _cut_names(values)
    if cut != values:
        atomic_json(file, cut)


def _cut_names(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: public_name(inner) if key.endswith("name_or_path") and isinstance(inner, str) else _cut_names(inner)
            for key, inner in value.items()
        }
    return [_cut_names(inner) for inner in value] if isinstance(value, list) else value
