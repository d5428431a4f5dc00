"""Recipes beside paper and code: docs/fidelity.md is made of tests/recipes/fidelity.yaml and the recipes.

python -m tests.recipes.test_fidelity    # writes it anew
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from davae.recipes.read import load_recipe, recipe_names
from tests.recipes import pages

PAGE = Path(__file__).parents[2] / "docs" / "fidelity.md"
TABLES: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("fidelity.yaml").read_text("utf-8"))
BEGIN, END = "<!-- tables: written by python -m tests.recipes.test_fidelity -->", "<!-- end of tables -->"
OF_OUR_OWN = {
    "ablation-debug", "ablation-design", "ablation-tiny", "debug", "debug-text", "tiny", "tiny-base", "tiny-nested",
    "imagenet-small-base", "imagenet-small-davae", "imagenet-small-native",
    "dc-ae15-small-f64", "dc-ae-small-f32", "dc-ae-small-f64", "dc-ae-small-f64-plain", "sd-vae-small-f64",
    "classes-taesd3-base", "classes-taesd3", "taesd3-photos", "taesd-photos", "starts-taesd3", "alignment-taesd3",
    "upscaler-taesd3", "generation-classes", "dc-ae-small-f16", "sd-vae-small-f16",
    "sd-vae-f32", "sd-vae-f64",  # the DC-AE paper's baseline, of which it gives neither widths nor training
}  # fmt: skip
"""Recipes without a counterpart in a paper; sizes for a CPU, mostly."""


@dataclass(frozen=True)
class Row:
    """A key of a recipe beside its sources; sources are what is shown, ``differs`` names those with another value."""

    key: str
    paper: str
    code: str
    value: str
    differs: tuple[str, ...]
    reason: str


def _value(recipe: dict[str, Any], key: str) -> Any:
    """A dotted key's value, or a product of several; a section that is not there has none."""
    parts = key.split(" x ")
    if len(parts) > 1:
        return math.prod(_value(recipe, part) for part in parts)
    found: Any = recipe
    for name in key.split("."):
        if found is None:
            return None
        found = found[name]
    return found


@cache
def _recipe(name: str) -> dict[str, Any]:
    return load_recipe(name).model_dump(mode="json")


@cache
def comments(name: str) -> dict[str, str]:
    """The comment in a key's line, by dotted key, of a bundled recipe."""
    found, path = {}, list[tuple[int, str]]()
    for line in (resources.files("davae.recipes") / f"{name}.yaml").read_text("utf-8").splitlines():
        key, colon, rest = line.partition(":")
        if not colon or key.lstrip().startswith("#"):
            continue
        indent = len(key) - len(key.lstrip())
        path = [entry for entry in path if entry[0] < indent] + [(indent, key.strip())]
        comment = rest.partition(" #")[2].strip()
        if comment:
            found[".".join(part for _, part in path)] = comment
    return found


def _shown(source: Any) -> str:
    if isinstance(source, dict):
        return str(source["said"])
    value = "none" if source is None else yaml.safe_dump(source, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{value}`"


def rows(table: dict[str, Any], name: str) -> Iterator[Row]:
    """The rows of one recipe."""
    for key, row in table["rows"].items():
        value = _value(_recipe(name), key)
        stated = {source: row[source] for source in ("paper", "code") if source in row}
        wanted = {source: s["value"] if isinstance(s, dict) else s for source, s in stated.items()}
        differs = tuple(source for source, other in wanted.items() if other != value)
        own = table.get("but", {}).get(name, {}).get(key)
        said = [comments(name)[part] for part in key.split(" x ") if part in comments(name)]
        reason = own or row.get("why") or "; ".join(said)
        paper, code = (_shown(stated[source]) if source in stated else "" for source in ("paper", "code"))
        yield Row(key, paper, code, _shown(value), differs, reason if differs else "")


def page() -> str:
    """A table for the first recipe of each kind, and for the others the rows in which they are not as the first."""
    parts = []
    for table in TABLES.values():
        first, *others = table["recipes"]
        parts.append(f"## {table['title']}\n\nPaper: {table['paper']}. Code: {table['code']}.\n")
        if "about" in table:
            parts.append(" ".join(table["about"].split()) + "\n")
        whole = list(rows(table, first))
        column = table.get("column", "official code")
        parts.append(f"### `{first}`\n\n{_table(whole, column)}")
        for name in others:
            changed = [row for row, known in zip(rows(table, name), whole, strict=True) if row.value != known.value]
            table_of = _table(changed, column) if changed else ""
            parts.append(
                f"### `{name}`\n\nAs `{first}`{', but' if changed else ' in all of these keys.'}\n\n{table_of}"
            )
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _table(shown: list[Row], column: str) -> str:
    lines = [f"| key | paper | {column} | recipe | why it differs |", "|---|---|---|---|---|"]
    for row in shown:
        key = " x ".join(f"`{part}`" for part in row.key.split(" x "))
        lines.append("| " + " | ".join([key, row.paper, row.code, row.value, row.reason]) + " |")
    return "\n".join(lines) + "\n"


def test_the_page_is_fresh() -> None:
    _, tables, _ = pages.parts(PAGE, BEGIN, END)
    assert tables == f"\n{page()}\n", (
        "recipes or sources have changed: write docs/fidelity.md anew with `python -m tests.recipes.test_fidelity`"
    )


def test_every_recipe_has_a_table_or_no_counterpart() -> None:
    in_tables = [name for table in TABLES.values() for name in table["recipes"]]
    assert len(in_tables) == len(set(in_tables))
    assert sorted([*in_tables, *OF_OUR_OWN]) == recipe_names()


@pytest.mark.parametrize(("table", "name"), [(t, n) for t in TABLES for n in TABLES[t]["recipes"]])
def test_a_recipe_says_why_it_differs(table: str, name: str) -> None:
    silent = [row for row in rows(TABLES[table], name) if row.differs and not row.reason]
    assert not silent, "\n".join(
        f"{name}: {row.key} is {row.value}, paper {row.paper}, code {row.code}: give a reason" for row in silent
    )


@pytest.mark.parametrize("table", TABLES)
def test_no_reason_is_left_where_nothing_differs(table: str) -> None:
    differing = {
        name: {row.key for row in rows(TABLES[table], name) if row.differs} for name in TABLES[table]["recipes"]
    }
    stale = {key for key, row in TABLES[table]["rows"].items() if "why" in row} - set().union(*differing.values())
    stale |= {
        (name, key) for name, keys in TABLES[table].get("but", {}).items() for key in keys.keys() - differing[name]
    }
    assert not stale


def test_a_changed_recipe_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of a recipe with another learning rate and no comment: one row more without a reason."""
    table, name = TABLES["sd3"], "sd35-medium-1024"
    changed = load_recipe(name, ["diffusion.optimizer.learning_rate=3e-4"]).model_dump(mode="json")
    monkeypatch.setitem(globals(), "_recipe", lambda _: changed)
    silent = [row for row in rows(table, name) if row.differs and not row.reason]
    assert [(row.key, row.value, row.differs) for row in silent] == [
        ("diffusion.optimizer.learning_rate", "`0.0003`", ("code",))
    ]


if __name__ == "__main__":
    pages.replace(PAGE, BEGIN, END, f"\n{page()}\n")
