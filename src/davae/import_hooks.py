"""Something to do once a module has been imported, without importing it now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Call ``action(module)`` right after the first import of a module, or at once where it is imported already.

    Args:
        name: of the module, such as ``diffusers``.
        action: gets the module. Several of one module are called in the order in which they were given.
    """
    if name in sys.modules:
        action(sys.modules[name])
        return
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    _FINDER.actions.setdefault(name, []).append(action)


class _Finder(MetaPathFinder):
    """Lets the other finders find a module, and wraps its loader."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        # By name: where this module is imported anew, the finder of the old one stays in the list.
        others = [finder for finder in sys.meta_path if type(finder).__qualname__ != type(self).__qualname__]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.actions)
        return spec


class _Loader(Loader):
    """Executes a module as its own loader does, then calls the actions. The module keeps its own loader."""

    def __init__(self, loader: Loader, actions: dict[str, list[Action]]) -> None:
        self._loader, self._actions = loader, actions

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        for action in self._actions.pop(module.__name__, ()):
            action(sys.modules[module.__name__])  # diffusers and transformers put another object there


_FINDER = _Finder()
