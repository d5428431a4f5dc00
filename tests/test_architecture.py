"""Imports run downward only: the order of the house, and the one place that knows it."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import davae

ROOT = Path(davae.__file__).parent
LAYERS = [
    {"runtime"},
    {"latents", "recipes"},
    {"diffusion"},
    {"models"},
    {"warm_start"},
    {"pipelines", "data"},
    {"tiny"},
    {"evaluation", "benchmark"},
    {"interop"},
    {"training"},
    {"bases"},
    {"report"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
BESIDE = {"choices", "errors", "import_hooks", "version", "__init__"}
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def _imports(file: Path) -> set[str]:
    """Names of our packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "davae":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("davae."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("davae.")}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{file}: relative import; name the module in full")
    return found


def _package(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_package_has_its_place():
    present = {_package(f) for f in ROOT.rglob("*.py")}
    assert present - BESIDE <= RANK.keys(), "a new package needs a place in LAYERS"


def test_imports_run_downward_only():
    wrong = []
    for file in ROOT.rglob("*.py"):
        here = _package(file)
        if here in BESIDE:
            continue
        for other in _imports(file) & RANK.keys():
            if other != here and RANK[other] >= RANK[here]:
                wrong.append(f"{file.relative_to(ROOT)} imports davae.{other}")
    assert not wrong


def _modules_imported(file: Path, modules: set[str]) -> set[str]:
    """Modules of ours that a file imports, anywhere in it, functions included."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & modules or {node.module} & modules
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & modules
    return found


# Each is one end of a circle.
STILL_IN_CIRCLES = {"davae.training.zero", "davae.evaluation.features.network"}


def test_modules_import_each_other_in_no_circle():
    files = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    imported = {name: _modules_imported(file, set(files)) for name, file in files.items()}
    for name in STILL_IN_CIRCLES & imported.keys():
        imported[name] = set()
    TopologicalSorter(imported).prepare()  # raises CycleError, which names the circle


def test_latents_and_diffusion_are_mathematics_only():
    for package, below in (("latents", set()), ("diffusion", {"latents"})):
        files = list((ROOT / package).glob("*.py"))
        assert len(files) > 1, package
        for file in files:
            assert _imports(file) <= {package, "choices", "errors"} | below, file
