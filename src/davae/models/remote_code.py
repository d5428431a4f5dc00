"""A class of davae as one file that needs only torch and diffusers, for use without davae.

The file is generated from davae's own modules: that of the class and all modules that it imports, one after another,
without their imports from each other. Only this module is replaced there.
"""

import ast
import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from davae.errors import DavaeError
from davae.runtime.atomic_files import allow_as_umask, atomic_write, remove_file
from davae.version import __version__

PACKAGE = "davae"
ROOT = Path(__file__).parents[1]

_HEADER = '''# Copyright the davae authors. Licensed under the Apache License, Version 2.0:
# https://www.apache.org/licenses/LICENSE-2.0
#
# Made by davae {version} from its own sources; needs torch and diffusers. With davae installed, `import davae` takes
# the place of this file.
"""{name} of davae, to be loaded with ``trust_remote_code=True``."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

_THIS_FILE = Path(__file__).read_text(encoding="utf-8")


def custom_code(name: str) -> str:
    """This file, to be saved again with the model."""
    return _THIS_FILE


def save_custom_code(name: str, file: Path) -> None:
    """Write this file into a folder that a model is saved to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(custom_code(name), encoding="utf-8")


def after_saving(folder: Path) -> None:
    """davae gives the weights the mode that the umask says; this file leaves them as they are."""
'''

_FOOTER = """
# ----------------------------------------------------------------------------------------------------------------
# diffusers runs such a file once for every component and folder, always in the same module. The classes that it
# gets come from a module of their own, run once: models from files of different versions can be used side by side.
_OWN_MODULE = "davae_" + hashlib.sha256(_THIS_FILE.encode()).hexdigest()[:16]
if __name__ != _OWN_MODULE:
    if _OWN_MODULE not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_OWN_MODULE, __file__)
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_OWN_MODULE] = _module
        _spec.loader.exec_module(_module)
    {name} = sys.modules[_OWN_MODULE].{name}
"""


@cache
def custom_code(name: str) -> str:
    """Source of a public class of davae with everything of davae that it uses; deterministic.

    Args:
        name: such as ``"AutoencoderDA"``, as in ``davae.AutoencoderDA``.

    Raises:
        DavaeError: davae's modules use something that cannot be put into one file; names module and line.
    """
    home, _ = _find_home(PACKAGE, name)
    modules: dict[str, _Module] = {}
    _collect(home, modules)
    _give_unique_names(modules)
    parts = [_HEADER.format(version=__version__, name=name)]
    parts += [_in_one_file(module, modules) for module in modules.values()]
    return "\n".join([*parts, _FOOTER.format(name=name)])


def save_custom_code(name: str, file: Path) -> None:
    """Write the source of a public class of davae into a folder that it is saved to."""
    atomic_write(file, custom_code(name))


def after_saving(folder: Path) -> None:
    """Give the weights in a folder the mode that the umask says, and forget an earlier save in shards.

    Its index names files that are no longer there, and loading would go by it.
    """
    allow_as_umask(folder)
    for index in folder.glob("*.index.json"):
        named = set(json.loads(index.read_bytes()).get("weight_map", {}).values())
        if not all((index.parent / name).is_file() for name in named):
            remove_file(index)


@dataclass
class _Module:
    name: str
    text: str
    tree: ast.Module
    defined: dict[str, str] = field(default_factory=dict)  # names bound by its own statements: their source
    external: dict[str, str] = field(default_factory=dict)  # names bound by imports from elsewhere
    imported: dict[str, tuple[str, str]] = field(default_factory=dict)  # name here: module and name of davae
    renamed: dict[str, str] = field(default_factory=dict)  # name here: name in the one file

    def fail(self, node: ast.AST, why: str) -> DavaeError:
        line = getattr(node, "lineno", 1)
        return DavaeError(f"{self.name}, line {line}: {why}; the custom-code file cannot be made")


def _file(module: str) -> Path:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_ours(module: str | None) -> bool:
    return module is not None and module.split(".")[0] == PACKAGE


def _find_home(module: str, name: str) -> tuple[str, str]:
    """The module that defines a name of ``module``, and its name there, following re-exports of packages."""
    file = _file(module)
    if file.name == "__init__.py":
        if _file(f"{module}.{name}").is_file():
            return f"{module}.{name}", ""
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):  # davae's own are for checkers alone
            if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return _find_home(str(node.module), alias.name)
    return module, name


def _collect(name: str, modules: dict[str, _Module]) -> None:
    """Add a module, preceded by those that it imports."""
    if name in modules or name == __name__:
        return
    text = _file(name).read_text(encoding="utf-8")
    module = _Module(name, text, ast.parse(text))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            for alias in node.names:
                home, original = _find_home(str(node.module), alias.name)
                _collect(home, modules)
                if original:
                    module.imported[alias.asname or alias.name] = home, original
    _read_bindings(module)
    modules[name] = module


def _read_bindings(module: _Module) -> None:
    for node in module.tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            whence = node.module if isinstance(node, ast.ImportFrom) else None
            if not _is_ours(whence):
                for alias in node.names:  # a library that offers a name in two places means the same
                    origin = f"{whence.split('.')[0]}: {alias.name}" if whence else f"import {alias.name}"
                    module.external[alias.asname or alias.name.split(".")[0]] = origin
            continue
        source = ast.get_source_segment(module.text, node) or ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            module.defined[node.name] = source
            continue
        for part in ast.walk(node):
            if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
                module.defined[part.id] = source


def _give_unique_names(modules: dict[str, _Module]) -> None:
    """If two modules use one name for different things, append the module's name to it in the later one."""
    taken: dict[str, str] = {}
    for module in modules.values():
        for name, origin in module.external.items():
            if taken.setdefault(name, origin) != origin:
                raise module.fail(module.tree, f"'{name}' is imported, and something else in another module")
    for module in modules.values():
        for name, source in module.defined.items():
            if taken.setdefault(name, source) != source:
                module.renamed[name] = f"{name}_of_{module.name.rpartition('.')[2]}"
        for name, (home, original) in module.imported.items():
            final = original if home == __name__ else modules[home].renamed.get(original, original)
            if final != name:
                module.renamed[name] = final


def _in_one_file(module: _Module, modules: dict[str, _Module]) -> str:
    """The module's text without its docstring and its imports of davae, with names that are unique in the file."""
    lines = module.text.encode().splitlines()
    for position, old, new in sorted(_name_positions(module), reverse=True):
        line, column = position
        assert lines[line - 1][column : column + len(old.encode())] == old.encode(), (module.name, line)
        lines[line - 1] = lines[line - 1][:column] + new.encode() + lines[line - 1][column + len(old.encode()) :]
    title = (ast.get_docstring(module.tree) or "").partition("\n")[0]
    for node in ast.walk(module.tree):
        if not _is_dropped(node, module):
            continue
        assert isinstance(node, ast.stmt)
        assert node.end_lineno is not None
        inside = node not in module.tree.body
        lines[node.lineno - 1] = b" " * node.col_offset + b"pass" if inside else b""
        for line in range(node.lineno, node.end_lineno):
            lines[line] = b""
    body = "\n".join(line.decode() for line in lines).strip("\n")
    while "\n\n\n\n" in body:
        body = body.replace("\n\n\n\n", "\n\n\n")
    rule = "# " + "-" * 112
    return f"\n{rule}\n# {module.name}: {title}\n\n{body}\n"


def _is_dropped(node: ast.AST, module: _Module) -> bool:
    if node is module.tree.body[0]:  # the docstring stands in the comment
        return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if isinstance(node, ast.ImportFrom):
        return node.module == "__future__" or _is_ours(node.module)
    return isinstance(node, ast.Import) and all(_is_ours(alias.name) for alias in node.names)


def _name_positions(module: _Module) -> list[tuple[tuple[int, int], str, str]]:
    """The names to change: (line, byte column), old name, new name."""
    if not module.renamed:
        return []
    found = []
    in_strings = {
        id(part) for node in ast.walk(module.tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
    }
    top = {id(node) for node in module.tree.body}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Name) and node.id in module.renamed:
            if id(node) in in_strings:
                raise module.fail(node, f"'{node.id}', which another module has too, stands in an f-string")
            found.append(((node.lineno, node.col_offset), node.id, module.renamed[node.id]))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in module.renamed:
            if id(node) not in top:
                continue  # a method
            word = "def " if isinstance(node, ast.FunctionDef) else "class "
            found.append(((node.lineno, len(word)), node.name, module.renamed[node.name]))
        elif isinstance(node, ast.arg) and node.arg in module.renamed:
            raise module.fail(node, f"argument '{node.arg}' hides a name that another module has too")
    return found
