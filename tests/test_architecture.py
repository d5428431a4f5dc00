"""The order of the house: imports run downward, nothing runs in a circle, no folder grows into a heap."""

import ast
from pathlib import Path

import pytest

import davae

ROOT = Path(davae.__file__).parent
LAYERS = [
    {"choices", "errors", "import_hooks", "version"},
    {"runtime", "latents", "recipes"},
    {"configs", "models", "diffusion", "warm_start", "data"},
    {"pipelines"},
    {"bases", "evaluation", "interop"},
    {"planner"},
    {"training"},
    {"benchmark"},
    {"experiments"},
    {"report"},
    {"demo", "studio", "comfyui"},
    {"cli"},
    {"__main__"},
]
"""Lowest first. A package imports lower ones; within a layer, those that come with it and make no circle."""
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
LARGEST_FOLDER = 15
LARGER = {"cli": 22}
MOST_FILES, MOST_LINES, MOST_IGNORES = 319, 50_800, 11

FILES = sorted(ROOT.rglob("*.py"))


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_module(file): file for file in FILES}


def _imported(file: Path) -> set[str]:
    """Our modules that a file imports, anywhere in it but for type checkers alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "davae"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import; name the module in full"
            if node.module and node.module.split(".")[0] == "davae":
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in MODULES else node.module for name in names}
    return found & MODULES.keys()


IMPORTS = {module: _imported(file) for module, file in MODULES.items()}


def _package(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def circles(arrows: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one node)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in arrows.get(node, ()):
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in order:
            visit(node)
    return found


def _between_folders(depth: int) -> dict[str, set[str]]:
    """Arrows between folders inside packages, so many levels below ``davae``; files beside folders count as such."""

    def folder(module: str) -> str:
        return ".".join(module.split(".")[: depth + 1])

    arrows: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        here = arrows.setdefault(folder(module), set())
        here |= {folder(other) for other in others if _package(other)} - {folder(module)}
    return arrows


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_every_package_has_its_place():
    assert {_package(m) for m in MODULES} - {""} == RANK.keys(), "a new package needs a place in LAYERS"


def test_imports_run_downward_only():
    wrong = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if _package(module)
        and _package(module) != _package(other)
        and RANK.get(_package(other), len(LAYERS)) > RANK[_package(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_circle_of_files():
    assert not circles(IMPORTS)


@pytest.mark.parametrize("depth", [1, 2])
def test_no_circle_of_folders(depth):
    assert not circles(_between_folders(depth))


@pytest.mark.parametrize(("package", "below"), [("latents", set()), ("diffusion", {"latents"})])
def test_mathematics_stands_alone(package, below):
    allowed = {package, "choices", "errors"} | below
    found = {_package(other) for m, others in IMPORTS.items() if _package(m) == package for other in others}
    assert found <= allowed


def test_folders_stay_small():
    counts: dict[str, int] = {}
    for file in FILES:
        if file.name != "__init__.py":
            counts[str(file.parent.relative_to(ROOT))] = counts.get(str(file.parent.relative_to(ROOT)), 0) + 1
    assert {f: n for f, n in counts.items() if n > LARGER.get(f, LARGEST_FOLDER)} == {}


def test_the_house_stays_small():
    lines = [line for file in FILES for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(FILES) <= MOST_FILES
    assert len(lines) <= MOST_LINES
    assert sum("type: ignore" in line for line in lines) <= MOST_IGNORES


HOME = ROOT / "runtime" / "atomic_files.py"
"""The one file that makes, renames and removes; others ask it, and :mod:`davae.runtime.places` whose a folder is."""
_NEVER = {
    *("mkdir", "makedirs", "rename", "renames", "rmdir", "removedirs", "rmtree", "copytree", "move", "unlink"),
    *("mkdtemp", "symlink_to", "hardlink_to", "touch", "copy2", "copyfile"),
}
_WRITES = {"save_pretrained", "write_text", "write_bytes", "save_file", "savefig", "savez"}
_HOMES_BLOCKS = {"atomic_file", "atomic_folder", "claim"}


def _written_elsewhere(tree: ast.AST) -> list[int]:
    """Lines that make, rename, remove or write what is on a disk, other than in a block that the home opened."""
    inside = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(
            isinstance(item.context_expr, ast.Call) and ast.unparse(item.context_expr.func) in _HOMES_BLOCKS
            for item in node.items
        )
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        text = [a.value for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
        opens = name in ("open", "fdopen") and any(str(v)[:1] in "wx" and len(str(v)) <= 3 for v in text if v)
        replaces = name == "replace" and (owner == "os" or (len(node.args) == 1 and not node.keywords and owner))
        in_memory = bool(node.args) and ast.unparse(node.args[0]) == "buffer"
        writes = (name in _WRITES or opens) and id(node) not in inside and owner != "super()" and not in_memory
        if name in _NEVER or replaces or writes:
            found.append(node.lineno)
    return found


def test_what_writes_is_found():
    for line in (
        "Path(out).mkdir()",
        "os.makedirs(out)",
        "os.replace(a, b)",
        "a.replace(b)",
        "shutil.rmtree(out)",
        "pipe.save_pretrained(out)",
        "file.write_text('{}')",
        "open(file, 'w')",
        "file.open('wb')",
        "with other(out) as f: pipe.save_pretrained(f)",
    ):
        assert _written_elsewhere(ast.parse(line)), line
    for line in (
        "with claim(out, 'result') as f: pipe.save_pretrained(f)",
        "with atomic_file(out) as f, f.open('wb') as g: savez(g)",
        "super().save_pretrained(out)",
        "text.replace('a', 'b')",
        "dataclasses.replace(settings, steps=1)",
        "file.open()",
        "open(file, 'a')",
    ):
        assert not _written_elsewhere(ast.parse(line)), line


def test_one_home_for_what_makes_renames_and_removes():
    found = {str(f.relative_to(ROOT)): _written_elsewhere(ast.parse(f.read_text(encoding="utf-8"))) for f in FILES}
    del found[str(HOME.relative_to(ROOT))]
    assert {file: lines for file, lines in found.items() if lines} == {}


_OWN_FILES = {
    *("models/remote_code.py", "recipes/presets/__init__.py", "recipes/read.py", "report/build.py", "report/schema.py"),
    "studio/page.py",
}
"""They read what is installed with davae, by its path in the package."""


def text_without_encoding(source: str, *, own: bool = False) -> list[str]:
    """Calls that read or write text in whatever encoding the machine has, or split it where a caption may not be.

    Args:
        source: of a module.
        own: whether it reads davae's own files; text of others comes through ``davae.runtime.text_files`` alone.
    """
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        method = isinstance(call.func, ast.Attribute)
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        of = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        given = {word.arg: word.value for word in call.keywords}
        at = 0 if method and of not in ("io", "os") else 1  # where the mode stands: path.open(mode), open(path, mode)
        mode = given.get("mode", call.args[at] if len(call.args) > at else ast.Constant("r"))
        in_text = isinstance(mode, ast.Constant) and "b" not in str(mode.value)  # source.open(index) gives bytes
        wrong = {
            "read_text": method and of != "text_files" and not (own and "encoding" in given),
            "write_text": "encoding" not in given,
            "open": in_text and "encoding" not in given and of != "os",
            "fdopen": in_text and "encoding" not in given,
            "TextIOWrapper": "encoding" not in given,
            "splitlines": not of.endswith(".encode()"),
            "readlines": True,
        }
        found += [ast.unparse(call)] if wrong.get(name) else []
    return found


def test_text_names_its_encoding_and_ends_its_lines_with_newlines_alone():
    assert len(text_without_encoding("p.read_text()\np.open('w')\nopen(p)\np.write_text(t)\nt.splitlines()")) == 5
    assert not text_without_encoding("p.open('rb')\nopen(p, 'w', encoding='utf-8')\nsource.open(index)\nos.open(p, 0)")
    assert text_without_encoding("p.read_text(encoding='utf-8')")  # of others: text_files.read_text(p)
    wrong = []
    for file in FILES:
        inside = file.relative_to(ROOT).as_posix()
        if inside != "errors.py":  # whose first_line is of messages
            found = text_without_encoding(file.read_text(encoding="utf-8"), own=inside in _OWN_FILES)
            wrong += [f"{inside}: {call}" for call in found]
    assert not wrong, wrong
