"""The notebooks run from the first cell to the last, and are kept without what they print."""

from __future__ import annotations

import ast
import json
import logging
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401  (its log goes to the standard error of its import, which a test's is not)
import pytest
import torch

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def run_cells(file: Path) -> list[Any]:
    """Run the code cells in one namespace, as Jupyter does; returns what each shows below it: its last expression."""
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = []
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], f"{file.name} holds output: clear it"
        code = ast.parse("".join(cell["source"]), f"{file.name} {cell['id']}")
        last = code.body.pop() if isinstance(code.body[-1], ast.Expr) else None
        exec(compile(code, f"{file.name} {cell['id']}", "exec"), names)
        if isinstance(last, ast.Expr):
            shown.append(eval(compile(ast.Expression(last.value), f"{file.name} {cell['id']}", "eval"), names))
    return shown


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_ends_with_a_picture(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("davae"), "level", logging.INFO)
    with torch.enable_grad():  # a notebook may turn it off
        shown = run_cells(file)
    assert any(hasattr(value, "size") and min(value.size) >= 64 for value in shown if value is not None)
    print_of = capsys.readouterr().out
    for words in {
        "method": ["(1, 3, 128, 128) -> (1, 60, 8, 8)", "with details", "alignment error 0."],
        "upgrade": ["base channels differ by", "details moved by 0e+00"],
        "training": ["step   12", "held_out_total"],
    }[file.stem]:
        assert words in print_of
