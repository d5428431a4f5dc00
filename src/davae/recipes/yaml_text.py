"""Strict reading of YAML: errors have the line, and scalars are converted by the type of their field.

YAML 1.1 reads ``2024`` as a number, ``no`` as a boolean and ``2024-01-15`` as a date. Here an unquoted scalar stays
text until its field is known (:func:`typed`), and a text field takes it as it is written.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from davae.errors import DavaeError
from davae.recipes.loop import Section
from davae.runtime import text_files

_MOST_BYTES = 1_000_000
_MOST_VALUES = 100_000
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Plain(str):
    """A scalar that was written without quotes."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """Keeps plain scalars as text; a key that occurs twice is an error."""


def _plain_scalar(loader: _Loader, node: yaml.Node) -> Any:
    assert isinstance(node, yaml.ScalarNode)
    return Plain(node.value) if node.style is None else node.value


def _mapping(loader: _Loader, node: yaml.Node) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise yaml.constructor.ConstructorError(None, None, "keys with values are expected here", node.start_mark)
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key.start_mark)
        line = key.start_mark.line + 1
        if key.value in lines:
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"'{key.value}' is there twice, in line {lines[key.value]} and line {line}; keep one of them",
            )
        lines[key.value] = line
    loader.flatten_mapping(node)  # merge keys (<<): explicit keys override merged ones
    return {str(key.value): loader.construct_object(value, deep=True) for key, value in node.value}


_SCALARS = ("str", "null", "bool", "int", "float", "timestamp")
_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
for _kind in _SCALARS:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _plain_scalar)


def read_text(file: Path) -> str:
    """The text of a recipe's file.

    Raises:
        DavaeError: there is no such file, it cannot be read, is larger than 1 MB, or is not text.
    """
    try:
        if not file.is_file():
            raise DavaeError(f"{file} is no file" if file.exists() else f"no recipe file {file}")
        if file.stat().st_size > _MOST_BYTES:
            raise DavaeError(f"{file} is larger than {_MOST_BYTES / 1e6:.0f} MB: it is no recipe")
        return text_files.read_text(file, most_bytes=_MOST_BYTES)
    except OSError as error:
        raise DavaeError(f"{file} cannot be read: {error.strerror or error}") from error


def plain_yaml(text: str) -> Any:
    """The values of a YAML document, by its safe rules.

    Raises:
        ValueError: it is not YAML, is nested too deeply, or holds an impossible date.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def parse_yaml(text: str, source: str) -> Any:
    """Parse the single YAML document in ``text``; unquoted scalars come out as :class:`Plain`.

    Args:
        text: YAML.
        source: its name in errors.

    Raises:
        DavaeError: in one line: it is not YAML, has a key twice, or has aliases that expand to more than 100,000
            values.
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise DavaeError(f"{source} is not valid YAML: {_told(error)}") from error
    except RecursionError as error:
        raise DavaeError(f"{source} is not valid YAML: it is nested too deeply") from error
    finally:
        if loader is not None:
            loader.dispose()


def typed(value: Any, annotation: Any) -> Any:
    """Convert the plain scalars in a value by the type of its field.

    Args:
        value: from :func:`parse_yaml`; values without :class:`Plain` are returned unchanged.
        annotation: the field's type.
    """
    kinds = _kinds(annotation)
    sections = [k for k in kinds if isinstance(k, type) and issubclass(k, Section)]
    if isinstance(value, Mapping):
        found = {}
        for key, inner in value.items():
            field = field_of(sections, key)
            found[key] = typed(inner, _items(kinds, dict) if field is None else field.annotation)
        return found
    if isinstance(value, list):
        return [typed(inner, _items(kinds, list, i)) for i, inner in enumerate(value)]
    if value is None or not isinstance(value, Plain):
        return value
    if value == "" and sections and type(None) not in kinds:
        return {}  # a section without keys
    return _scalar(value, kinds)


def field_of(sections: list[type[Section]], key: str) -> FieldInfo | None:
    """The field of a key in the first section that has it; ``None`` if none has."""
    return next((s.model_fields[key] for s in sections if key in s.model_fields), None)


def takes_text(annotation: Any) -> bool:
    """Whether a field of this type takes text."""
    return any(kind is str for kind in _kinds(annotation))


def _scalar(text: Plain, kinds: list[Any]) -> Any:
    """Text if the field takes text, else null, a boolean or a number if it is one."""
    empty = text == "" or text == "~" or text.lower() == "null"
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if empty and (type(None) in kinds or text == ""):
        return None
    if str in kinds or text in choices:
        return str(text)
    if text.lower() in _TRUTH and (bool in kinds or not {int, float} & set(kinds)):
        return _TRUTH[text.lower()]
    for number in (int, float):
        try:
            return number(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            continue
    return None if empty else str(text)


def _kinds(annotation: Any) -> list[Any]:
    """The types of a union, without their annotations."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _kinds(part)]
    return [annotation]


def _items(kinds: list[Any], container: type, index: int = 0) -> Any:
    """The type of the items of a list (or tuple) or a mapping; ``None`` if unknown."""
    for kind in kinds:
        origin, inner = get_origin(kind), get_args(kind)
        if container is dict and origin is dict:
            return inner[1]
        if container is list and origin in (list, tuple):
            return inner[index] if origin is tuple and index < len(inner) and inner[-1] is not ... else inner[0]
    return None


def _check_size(node: yaml.Node) -> None:
    """Count the values of a document with its aliases expanded.

    Raises:
        yaml.YAMLError: there are too many, or an alias contains itself.
    """
    counted: dict[int, int] = {}
    open_nodes: set[int] = set()

    def count(part: yaml.Node) -> int:
        known = counted.get(id(part))
        if known is not None:
            return known
        if id(part) in open_nodes:
            raise yaml.constructor.ConstructorError(None, None, "an alias stands for itself", part.start_mark)
        open_nodes.add(id(part))
        inner: list[yaml.Node] = []
        if isinstance(part, yaml.MappingNode):
            inner = [node for pair in part.value for node in pair]
        elif isinstance(part, yaml.SequenceNode):
            inner = list(part.value)
        total = 1 + sum(count(node) for node in inner)
        if total > _MOST_VALUES:
            raise yaml.constructor.ConstructorError(
                None, None, f"it stands for more than {_MOST_VALUES:,} values", part.start_mark
            )
        open_nodes.remove(id(part))
        counted[id(part)] = total
        return total

    count(node)


def _told(error: yaml.YAMLError) -> str:
    """The error and its line, in one line."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.problem, error.context) if part)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        return f"{what}{where}"
    if isinstance(error, yaml.reader.ReaderError):
        return f"character number {error.position} is no text ({error.reason})"
    return " ".join(str(error).split())
