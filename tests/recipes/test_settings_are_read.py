"""A setting nobody reads is a promise nobody keeps: reads are found by the type of what they are read from."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from mypy.build import BuildResult, BuildSource, build
from mypy.nodes import MemberExpr, MypyFile, TypeInfo, Var
from mypy.options import Options
from mypy.traverser import NameAndMemberCollector
from mypy.types import Instance, Type, UnionType, get_proper_type

import davae
from davae.recipes.settings import DiffusionSettings
from tests.recipes.test_reference import sections

ROOT = Path(davae.__file__).parent
#: Sections that are handed on as keyword arguments: to what, and the names it takes.
HANDED_ON = {
    "AutoencoderModelSettings": inspect.signature(davae.AutoencoderDA.from_base).parameters,
    "BaseTransformerArchitecture": inspect.signature(davae.LightningDiTTransformer2DModel).parameters,
    "BaseTransformerSettings": DiffusionSettings.model_fields,
}
#: Read while a recipe is parsed, or by people.
READ_ELSEWHERE = {"kind", "family", "description"}


def _check(changed: Mapping[str, str]) -> BuildResult:
    """What mypy knows of davae's own code, without other packages; ``changed`` holds texts to take for modules."""
    sources = []
    for file in sorted(ROOT.rglob("*.py")):
        module = ".".join(["davae", *file.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        sources.append(BuildSource(str(file), module, changed.get(module)))
    options = Options()
    options.no_site_packages, options.python_executable, options.ignore_missing_imports = True, None, True
    options.check_untyped_defs = options.export_types = options.preserve_asts = True
    options.incremental, options.ignore_errors = False, True
    return build(sources, options)


def _members(file: MypyFile) -> list[MemberExpr]:
    """The expressions ``x.name`` of a file."""
    collector = NameAndMemberCollector()
    file.accept(collector)
    return collector.member_exprs


def _instances(of: Type | None) -> Iterator[TypeInfo]:
    """The classes that a type may be."""
    proper = get_proper_type(of)
    if isinstance(proper, UnionType):
        for item in proper.items:
            yield from _instances(item)
    elif isinstance(proper, Instance):
        yield proper.type


def _unread(changed: Mapping[str, str]) -> list[str]:
    """Settings, as ``Class.field``, that no code reads beside the modules that define them."""
    result = _check(changed)
    defining = {section.__module__ for section in sections()}
    reads = {
        (info.fullname, node.name)
        for name, file in result.files.items()
        if name.startswith("davae.") and name not in defining
        for node in _members(file)
        for info in _instances(result.types.get(node.expr))
    }
    unread = []
    for section in sections():
        info = result.files[section.__module__].names[section.__name__].node
        assert isinstance(info, TypeInfo)
        ancestors = [a for a in info.mro if a.module_name.startswith("davae.recipes") and a.name != "Section"]
        fields = {n for a in ancestors for n, symbol in a.names.items() if isinstance(symbol.node, Var)}
        read = {field for field in fields for a in ancestors if (a.fullname, field) in reads}
        unread += [
            f"{info.name}.{field}"
            for field in sorted(fields - read - READ_ELSEWHERE - HANDED_ON.get(info.name, {}).keys())
        ]
    return unread


#: Module, class, and settings for it that nobody reads. Other objects have attributes of these names, and other
#: sections settings of these names.
PLANTED = {
    "loop": ("OptimizerSettings", "name", "path", "weight"),
    "data": ("DataSettings", "steps"),
    "dc_ae": ("MeasureSettings", "resolution"),
    "settings": ("AutoencoderModelSettings", "shape"),
}


@pytest.fixture(scope="module")
def unread() -> set[str]:
    """The settings that are not read, the planted ones among them."""
    changed = {}
    for module, (section, *names) in PLANTED.items():
        text = (ROOT / "recipes" / f"{module}.py").read_text(encoding="utf-8")
        line = next(line for line in text.splitlines() if line.startswith(f"class {section}("))
        fields = "".join(f"    {name}: int = 0\n" for name in names)
        changed[f"davae.recipes.{module}"] = text.replace(f"{line}\n", f"{line}\n{fields}")
    return set(_unread(changed))


def test_every_setting_is_read(unread: set[str]) -> None:
    assert not unread - _planted()


def test_an_unread_setting_is_found_whatever_its_name(unread: set[str]) -> None:
    assert _planted() <= unread


def _planted() -> set[str]:
    return {f"{section}.{name}" for section, *names in PLANTED.values() for name in names}
