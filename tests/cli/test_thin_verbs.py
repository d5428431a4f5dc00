"""Verbs stay thin: options, one call of a public function, its result printed. What needs more belongs to davae."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import davae.cli
from davae.cli.main import app
from davae.cli.options import DType, ModelDType

FILES = sorted(Path(davae.cli.__file__).parent.glob("*.py"))
LIGHT = {
    "davae.choices",
    "davae.cli",
    "davae.cli.options",
    "davae.errors",
    "davae.import_hooks",
    "davae.runtime.console",
    "davae.runtime.text_files",
    "davae.runtime.atomic_files",
    "davae.runtime.places",
    "davae.training.loop.signals",
    "davae.version",
}
MOST_STATEMENTS = 12
MOST_FUNCTIONS = 3  # of davae, in one verb: such as one to work, one that shows its result, one for another option
LOGIC = (
    ast.For, ast.While, ast.With, ast.Try, ast.FunctionDef, ast.Lambda,
    ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp,
)  # fmt: skip


def _verbs(group: typer.Typer, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for command in group.registered_commands:
        assert command.callback is not None
        yield f"{prefix}{command.name or command.callback.__name__}", command.callback
    for inner in group.registered_groups:
        assert inner.typer_instance is not None
        yield from _verbs(inner.typer_instance, f"{inner.name} ")


VERBS = dict(_verbs(app))


def _body(function: Any) -> list[ast.AST]:
    """Everything in a function's body, nested or not, without its docstring."""
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(definition, ast.FunctionDef)
    assert ast.get_docstring(definition), f"{function} has no help"
    return [node for statement in definition.body[1:] for node in ast.walk(statement)]


@pytest.mark.parametrize("name", sorted(VERBS))
def test_a_verb_is_thin(name: str) -> None:
    nodes = _body(VERBS[name])
    logic = [type(node).__name__ for node in nodes if isinstance(node, LOGIC)]
    assert not logic, f"`davae {name}` has {logic}: move it into a function that Python can call"
    statements = [node for node in nodes if isinstance(node, ast.stmt)]
    assert len(statements) <= MOST_STATEMENTS
    imported = {
        alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("davae.")
        for alias in node.names
        if not alias.name[0].isupper() and node.module != "davae.cli.tables" and alias.name != "ablation_table"
    }
    assert 1 <= len(imported) <= MOST_FUNCTIONS


def test_a_verb_that_computes_with_weights_takes_their_precision() -> None:
    """Where a device can be chosen, so can the type of the weights; both help texts are those of all verbs."""
    computing = {name: inspect.signature(verb).parameters for name, verb in VERBS.items()}
    computing = {name: taken for name, taken in computing.items() if "device" in taken}
    assert len(computing) >= 8
    assert [name for name, taken in computing.items() if "dtype" not in taken] == []
    assert {str(taken["dtype"].annotation) for taken in computing.values()} <= {str(ModelDType), str(DType)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_file_imports_the_work_where_it_is_called(file: Path) -> None:
    """What stands at the top of a file is paid for by ``davae --help``."""
    top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
    ours = {name for name in names if name.startswith("davae")}
    if file.name != "tables.py":  # imported when there is a result
        assert {name for name in ours if not name.startswith("davae.cli")} <= LIGHT
    assert not names & {"torch", "diffusers", "transformers", "accelerate", "numpy", "matplotlib"}
