"""Callbacks that run when a module is first imported, and plug-ins: entry points of other packages."""

import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from davae.errors import DavaeError

Action = Callable[[ModuleType], None]
_called: set[str] = set()


def plugin_names(group: str) -> list[str]:
    """Names of the installed plug-ins of a group, without loading them."""
    return sorted(entry.name for entry in metadata.entry_points(group=group))


def plugin(group: str, name: str) -> Callable[..., Any]:
    """The function that a plug-in names.

    Raises:
        DavaeError: it cannot be imported, or is no function; the message names its package.
    """
    entry = next(entry for entry in metadata.entry_points(group=group) if entry.name == name)
    told = f"the plug-in {name} = {entry.value} ({group})"
    told += f" of the package {entry.dist.name}" if entry.dist is not None else ""
    try:
        found = entry.load()
    except Exception as error:
        raise DavaeError(f"{told} cannot be loaded ({error}): mend it, or uninstall its package") from error
    if not callable(found):
        raise DavaeError(f"{told} is no function: name one (docs/training.md, Plug-ins)")
    function: Callable[..., Any] = found
    return function


def call_plugins(group: str) -> None:
    """Call the functions of all plug-ins of a group, once: they register what they bring."""
    if group not in _called:
        _called.add(group)
        for name in plugin_names(group):
            plugin(group, name)()


def after_import(name: str, action: Action) -> None:
    """Call ``action(module)`` right after the first import of a module, or at once if it is already imported.

    Args:
        name: of the module, such as ``diffusers``.
        action: receives the module. Several for one module are called in the order they were given.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.actions.setdefault(name, []).append(action)


class _Finder(MetaPathFinder):
    """Delegates to the other finders and wraps the loader, so that the actions run after the module's own code."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        # By name: if this module is imported again, its earlier finder is still in the list.
        others = [finder for finder in sys.meta_path if type(finder).__qualname__ != type(self).__qualname__]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for action in self.actions.pop(fullname, ()):
                    action(sys.modules[fullname])  # diffusers and transformers replace themselves there

            vars(spec.loader)["exec_module"] = exec_module  # of this instance only: each loader serves one module
        return spec


_FINDER = _Finder()
