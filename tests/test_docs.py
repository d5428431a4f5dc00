"""What README, CONTRIBUTING and docs name is there: files, modules, public names, recipes, verbs."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from davae.cli.main import app
from davae.recipes.read import load_recipe, recipe_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(
    r"(?<![\w./-])(?:src|tests|docs|configs)/[\w./-]+\.(?:py|yaml|yml|md|json|sbatch|sh|png|safetensors)\b"
)
NAME = re.compile(r"(?<![\w./@-])davae(?:\.[A-Za-z_]\w*)+(?![\w/-])")
RECIPE = re.compile(r"--recipe ([\w.-]+)(?=[\s`])")
VERB = re.compile(r"(?:^    |`)davae ([a-z][\w-]*)", re.M)
NO_NAMES = {
    *("davae.py", "davae.egg"),  # the file of code beside saved weights
    *("davae.families", "davae.adapters", "davae.sources"),  # groups of entry points
}
MADE_BY_HAND = {"my", "mine"}  # recipes of a reader's own


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return attribute in getattr(found, "__annotations__", {})
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path):
    text = page.read_text(encoding="utf-8")
    missing = [file for file in set(FILE.findall(text)) if not (ROOT / file).exists()]
    missing += [
        f"{file}::{test}"
        for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
        if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    missing += [link for link in re.findall(r"\]\(([\w./-]+\.\w+)", text) if not (page.parent / link).exists()]
    missing += [name for name in set(NAME.findall(text)) - NO_NAMES if not _resolves(name)]
    missing += [f"recipe {name}" for name in set(RECIPE.findall(text)) - MADE_BY_HAND if not _is_recipe(name)]
    verbs = {(c.name or c.callback.__name__) for c in app.registered_commands} | {g.name for g in app.registered_groups}
    missing += [f"verb {verb}" for verb in set(VERB.findall(text)) - verbs]
    assert not missing


def _is_recipe(name: str) -> bool:
    return name in recipe_names() or name.endswith((".yaml", ".yml")) or name.isupper()


def test_settings_that_the_comforts_name_are_taken():
    """Those in one code span together."""
    text = (ROOT / "docs" / "comforts.md").read_text(encoding="utf-8")
    spans = [shlex.split(span) for span in re.findall(r"`([\w.]+=[^`]+)`", text)]
    assert len(spans) > 15
    for overrides in spans:
        load_recipe("debug-text", overrides)
