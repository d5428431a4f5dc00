"""The tables of keys in docs/training.md and of recipes in docs/recipes.md are made from settings and recipes.

python -m tests.recipes.test_reference    # writes them anew
"""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from davae.recipes.loop import MAY_CHANGE, MAY_MOVE, Section
from davae.recipes.read import KINDS, load_recipe, recipe_names, sections_of
from davae.recipes.settings import UpgradeRecipe
from tests.recipes import pages

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
BEGIN, END = "<!-- keys: written by python -m tests.recipes.test_reference -->", "<!-- end of keys -->"
RECIPES = PAGE.with_name("recipes.md")
RECIPES_BEGIN, RECIPES_END = (
    "<!-- recipes: written by python -m tests.recipes.test_reference -->",
    "<!-- end of recipes -->",
)
_VERBS = {
    "upgrade": "`davae train autoencoder`, then `davae train diffusion`",
    "base": "`davae train base`",
    "dc-ae": "`davae train dc-ae`, phase by phase",
    "ablation": "`davae ablate`",
}
_WORDS = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
_BOUNDS = {Gt: ("gt", ">"), Ge: ("ge", "≥"), Lt: ("lt", "<"), Le: ("le", "≤")}


def sections() -> dict[type[Section], dict[str, list[str]]]:
    """Every section of every kind of recipe, with the dotted paths where it stands, by kind."""
    found: dict[type[Section], dict[str, list[str]]] = {}
    for kind, model in KINDS.items():
        for path, section in sections_of(model):
            found.setdefault(section, {}).setdefault(kind, []).append(path)
    return found


def reference() -> str:
    """A table for each section, in the order of the files."""
    return "".join(_table(section, places) for section, places in sections().items())


def recipes() -> str:
    """A table of the recipes of each kind, with the base of those that have one."""
    found = {name: load_recipe(name) for name in recipe_names()}
    tables = []
    for kind, verb in _VERBS.items():
        rows = [
            f"| `{name}` | {f'`{r.base}`: ' if isinstance(r, UpgradeRecipe) else ''}{_markdown(r.description)} |"
            for name, r in found.items()
            if r.kind == kind
        ]
        tables.append("\n".join([f"\n**{kind}**: {verb}\n", "| recipe | |\n|---|---|", *rows, ""]))
    return "".join(tables)


def _table(section: type[Section], places: dict[str, list[str]]) -> str:
    where = "; ".join(
        f"{kind}: {', '.join(f'`{path}`' if path else 'top level' for path in paths)}" for kind, paths in places.items()
    )
    fields = section.model_fields.items()
    rows = [row for name, field in fields if (row := _row(name, field, _description(section, name)))]
    if not rows:
        return ""
    head = "| key | default | values | meaning |\n|---|---|---|---|"
    return "\n".join([f"\n**{where}**. {_markdown(section.__doc__)}\n", head, *rows, ""])


def _row(name: str, field: FieldInfo, description: str) -> str | None:
    if _is_section(field):
        return f"| `{name}` | | section | {description} |" if description else None
    default = "required" if field.is_required() else _default(field.default)
    mark = " ↻" if MAY_CHANGE in field.metadata else " ⇄" if MAY_MOVE in field.metadata else ""
    return f"| `{name}`{mark} | {default} | {_values(field.annotation, field.metadata)} | {description} |"


def _is_section(field: FieldInfo) -> bool:
    return any(isinstance(part, type) and issubclass(part, Section) for part in _parts(field.annotation))


def _description(section: type[Section], name: str) -> str:
    """A field's, or that of the field which it gives another default."""
    ancestors = (a.model_fields.get(name) for a in section.__mro__ if issubclass(a, Section))
    return _markdown(next((field.description for field in ancestors if field and field.description), ""))


def _markdown(text: str | None) -> str:
    return " ".join((text or "").split()).replace("``", "`").replace("|", "\\|")


def _default(value: Any) -> str:
    """As it is written in a recipe."""
    if value is None:
        return "none"
    if not isinstance(value, str):
        value = list(value) if isinstance(value, tuple) else value
        value = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{value}`"


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union other than None; anything else is its only member."""
    members = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return tuple(m for m in members if m is not type(None))


def _values(annotation: Any, metadata: list[Any]) -> str:
    """What a value may be, in words."""
    return " or ".join(_one(part, metadata) for part in _parts(annotation))


def _one(part: Any, metadata: list[Any]) -> str:
    origin, inner = get_origin(part), get_args(part)
    if origin is Annotated:
        return _one(inner[0], [*_constraints(inner[1:]), *metadata])
    if isinstance(part, type) and issubclass(part, Section):
        return "sections"
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin is list:
        return f"list of {_one(inner[0], [])}"
    if origin is tuple:
        words = [_one(i, []) for i in inner if i is not ...]
        return f"list of {words[0]}" if ... in inner else f"[{', '.join(words)}]"
    if origin is dict:
        return "names with lists of text"
    bounds = [
        f" {sign} {getattr(m, attribute):g}"
        for m in metadata
        for attribute, sign in [_BOUNDS.get(type(m), ("", ""))]
        if sign
    ]
    return _WORDS[part] + ",".join(bounds)


def _constraints(metadata: tuple[Any, ...]) -> list[Any]:
    return [m for entry in metadata for m in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]


def test_the_tables_of_keys_are_fresh() -> None:
    _, keys, _ = pages.parts(PAGE, BEGIN, END)
    assert keys == f"\n{reference()}\n", (
        "the settings have changed: write docs/training.md anew with `python -m tests.recipes.test_reference`"
    )


def test_the_table_of_recipes_is_fresh() -> None:
    _, table, _ = pages.parts(RECIPES, RECIPES_BEGIN, RECIPES_END)
    assert table == f"\n{recipes()}\n", (
        "the recipes have changed: write docs/recipes.md anew with `python -m tests.recipes.test_reference`"
    )
    assert table.count("\n| `") == len(recipe_names())


@pytest.mark.parametrize("section", sections())
def test_every_setting_has_a_description(section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert _is_section(field) or _description(section, name), f"{name}: write a docstring below it"


if __name__ == "__main__":
    pages.replace(PAGE, BEGIN, END, f"\n{reference()}\n")
    pages.replace(RECIPES, RECIPES_BEGIN, RECIPES_END, f"\n{recipes()}\n")
