"""Callbacks that run when a module is first imported."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[ModuleType], None]


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
