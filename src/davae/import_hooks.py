"""Something to do once a module has been imported, without importing it now."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

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
    """Lets the other finders find a module, and has its loader call the actions after the module's own code."""

    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        # By name: where this module is imported again, the finder of the old one stays in the list.
        others = [finder for finder in sys.meta_path if type(finder).__qualname__ != type(self).__qualname__]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for action in self.actions.pop(fullname, ()):
                    action(sys.modules[fullname])  # diffusers and transformers put another object there

            vars(spec.loader)["exec_module"] = exec_module  # of this one loader, which is made for this module
        return spec


_FINDER = _Finder()
