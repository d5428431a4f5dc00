"""The snippets in the docstrings of davae.diffusion run and give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import davae.diffusion

MODULES = [module.name for module in pkgutil.iter_modules(davae.diffusion.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_snippet_that_holds(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(f"davae.diffusion.{name}"))
    assert tried > 0
    assert failed == 0
