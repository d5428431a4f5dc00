"""The one-file code for people without davae: complete, the same every time, and true to davae's modules."""

from __future__ import annotations

import ast
import sys
import textwrap
from pathlib import Path

import pytest

import davae
from davae.errors import DavaeError
from davae.models import remote_code as bundler
from davae.models.remote_code import custom_code

NAMES = ["AutoencoderDA", "LightningDiTTransformer2DModel", "ClassConditionalPipeline"]


@pytest.mark.parametrize("name", NAMES)
def test_complete_and_free_of_davae(name: str) -> None:
    tree = ast.parse(custom_code(name))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    third_party = imported - sys.stdlib_module_names - {"__future__"}
    assert third_party <= {"torch", "diffusers", "numpy"}, "needs more than torch and diffusers"
    defined = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert name in defined
    assert "Apache License, Version 2.0" in custom_code(name)[:300]


def test_every_adapter_of_a_base_is_in_the_file() -> None:
    tree = ast.parse(custom_code("AutoencoderDA"))
    there = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    from davae.models.base_adapters.adapter import _ADAPTERS

    ours = {
        type(adapter).__name__ for _, adapter in _ADAPTERS.values() if type(adapter).__module__.startswith("davae.")
    }
    assert ours
    assert ours <= there


def test_the_same_every_time() -> None:
    first = custom_code("AutoencoderDA")
    custom_code.cache_clear()
    assert custom_code("AutoencoderDA") == first


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes modules of a small package in davae's place; gives the one file made from it."""

    def make(**modules: str) -> str:
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        (tmp_path / "__init__.py").write_text("from davae.top import Top\n")
        custom_code.cache_clear()
        return custom_code("Top")

    monkeypatch.setattr(bundler, "ROOT", tmp_path)
    yield make
    custom_code.cache_clear()


def run(code: str, tmp_path: Path) -> dict[str, object]:
    file = tmp_path / "one_file.py"
    file.write_text(code)
    values: dict[str, object] = {"__name__": "one_file", "__file__": str(file)}
    exec(compile(code, str(file), "exec"), values)
    return values


def test_names_that_two_modules_share_are_kept_apart(package, tmp_path: Path) -> None:
    code = package(
        helper='''
            """A helper."""
            def _size(x):
                return len(x)
            class Part:
                def _size(self):  # a method stays as it is
                    return _size("ab")
        ''',
        top='''
            """The top."""
            import math
            from davae.helper import Part as Piece, _size as length
            def _size(x):
                return math.floor(x)
            class Top:
                """Uses both."""
                def all(self):
                    from davae.helper import Part
                    return _size(2.5), length("abc"), Piece()._size(), Part()._size()
        ''',
    )  # fmt: skip
    assert run(code, tmp_path)["Top"]().all() == (2, 3, 2, 2)  # type: ignore[operator]
    assert "davae." not in "".join(line for line in code.splitlines() if not line.startswith("#"))


@pytest.mark.parametrize(
    ("helper", "top", "message"),
    [
        (
            "def _f():\n    pass",
            "def _f():\n    return 1\nclass Top:\n    def g(self, _f):\n        pass",
            "argument '_f'",
        ),
        ("def _f():\n    pass", "def _f():\n    return 1\nclass Top:\n    x = f'{_f}'", "f-string"),
        ("from os import path", "from sys import path\nclass Top:\n    pass", "'path' is imported"),
    ],
)
def test_what_does_not_fit_into_one_file_is_an_error_with_its_place(package, helper, top, message) -> None:
    top = f'"""T."""\nfrom davae.helper import _g as _h\n{top}\n'
    with pytest.raises(DavaeError, match=message):
        package(helper=f'"""H."""\n{helper}\n', top=top)


def test_classes_of_davae_are_known_by_one_library_name() -> None:
    for name in NAMES:
        assert getattr(davae, name).__module__ == "davae"
