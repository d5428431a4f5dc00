"""Reading recipes: YAML by name or file, overrides as ``key=value``, mistakes as one clear line."""

import difflib
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from davae.errors import DavaeError
from davae.recipes.dc_ae import DcAeRecipe
from davae.recipes.loop import MAY_CHANGE, Section
from davae.recipes.settings import AblationRecipe, BaseRecipe, UpgradeRecipe

Recipe = UpgradeRecipe | BaseRecipe | DcAeRecipe | AblationRecipe
KINDS: dict[str, type[UpgradeRecipe] | type[BaseRecipe] | type[DcAeRecipe] | type[AblationRecipe]] = {
    "upgrade": UpgradeRecipe,
    "base": BaseRecipe,
    "dc-ae": DcAeRecipe,
    "ablation": AblationRecipe,
}


def recipe_names() -> list[str]:
    """Names of the recipes that come with davae."""
    folder = resources.files("davae.recipes")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_recipe(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe by name (``tiny``) or from a YAML file and apply ``section.key=value`` overrides.

    Raises:
        DavaeError: no such recipe, an unknown key (with the nearest right one), or a bad value.
    """
    path = Path(name_or_file)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise DavaeError(f"no recipe file {path}")
        text, source = path.read_text(), str(path)
    else:
        name = str(name_or_file)
        if name not in recipe_names():
            raise DavaeError(
                f"no recipe named '{name}'{_nearest(name, recipe_names())}; "
                f"there are {', '.join(recipe_names())}, or give a .yaml file"
            )
        text = (resources.files("davae.recipes") / f"{name}.yaml").read_text()
        source = f"recipe '{name}'"
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DavaeError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise DavaeError(f"{source} must hold sections with keys, not {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values, source)


def load_ablation(name_or_file: str | Path, overrides: Sequence[str] = ()) -> AblationRecipe:
    """:func:`load_recipe` of an ablation, whose variants are read too.

    Raises:
        DavaeError: as there, for the ablation or one of its variants, or it is of another kind.
    """
    recipe = load_recipe(name_or_file, overrides)
    if not isinstance(recipe, AblationRecipe):
        raise DavaeError(f"recipe '{name_or_file}' is of kind '{recipe.kind}', not an ablation")
    for name in recipe.variants:
        load_variant(recipe, name, recipe.seeds[0])
    return recipe


def load_variant(recipe: AblationRecipe, name: str, seed: int) -> UpgradeRecipe:
    """The upgrade recipe of a variant of an ablation, with one of its seeds.

    Raises:
        DavaeError: as for :func:`load_recipe`, or the ablation is not of an upgrade.
    """
    seeds = [f"autoencoder.loop.seed={seed}", f"diffusion.loop.seed={seed}"]
    found = load_recipe(recipe.recipe, [*recipe.overrides, *recipe.variants[name], *seeds])
    if not isinstance(found, UpgradeRecipe):
        raise DavaeError(f"variant '{name}': {recipe.recipe} is a recipe of kind '{found.kind}', not an upgrade")
    return found


def parse_recipe(values: dict[str, Any], source: str) -> Recipe:
    """Validate plain values into the typed recipe of their ``kind``."""
    kind = values.get("kind", "upgrade")
    if kind not in KINDS:
        raise DavaeError(f"{source}: kind is '{kind}'; known kinds are {', '.join(KINDS)}")
    try:
        return KINDS[kind].model_validate(values)
    except ValidationError as error:
        raise DavaeError(_one_line(error, KINDS[kind], source)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def with_later_settings(dumped: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version dumped, with settings that came since at their defaults.

    What is no recipe of today (a setting was taken away, say) stays as it is, to be compared as it is.
    """
    kind = KINDS.get(dumped.get("kind", "upgrade"))
    if kind is None:
        return dumped
    data = dumped.get("data")
    if isinstance(data, dict) and data.get("crop") == "random" and data.get("cache_latents"):
        # An earlier version let both stand and kept no latents then.
        dumped = {**dumped, "data": {**data, "cache_latents": False}}
    try:
        known = kind.model_validate({key: dumped[key] for key in dumped if key in kind.model_fields})
    except ValidationError:
        return dumped
    return dumped | known.model_dump(mode="json")


def sections_of(model: type[Section], path: str = "") -> Iterator[tuple[str, type[Section]]]:
    """A section and all below it, each with its dotted path (empty for the first)."""
    yield path, model
    for name, field in model.model_fields.items():
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, Section):
                yield from sections_of(part, f"{path}.{name}".lstrip("."))


def resumable_keys(kind: str) -> set[str]:
    """Dotted names of the settings that a run of such a recipe may continue with other values of."""
    model = KINDS.get(kind)
    return {key for key, field in _dotted_fields(model) if MAY_CHANGE in field.metadata} if model else set()


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of the values in which two dumped recipes differ, with both values."""
    found = []
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {b} -> {a}")
    return found


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise DavaeError(f"override '{override}' is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DavaeError(f"override '{override}': the value is not valid YAML") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text; people mean a number
        try:
            value = float(value)
        except ValueError:
            value = text
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise DavaeError(f"override '{override}': '{section}' is a value, not a section")
    values[last] = value


def _one_line(error: ValidationError, model: type[Section], source: str) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = dict(_dotted_fields(model))
        siblings = [k for k in known if k.rpartition(".")[0] == where.rpartition(".")[0]]
        name = where.rpartition(".")[2]
        elsewhere = [k for k in known if k.rpartition(".")[2] == name]
        elsewhere.sort(key=lambda k: k.split(".")[0] != where.split(".")[0])  # the same section first
        near = elsewhere or difflib.get_close_matches(where, siblings, n=1, cutoff=0.6)
        hint = f"; did you mean '{near[0]}'?" if near else f"; known here: {', '.join(siblings)}"
        return f"{source}: unknown key '{where}'{hint}"
    if first["type"] == "missing":
        return f"{source}: '{where}' is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # of a section: names its keys
        return f"{source}: {message}" if where in ("", "data") else f"{source}: '{where}': {message}"
    return f"{source}: '{where}' is {first['input']!r}: {message}"


def _dotted_fields(model: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    for path, section in sections_of(model):
        for name, field in section.model_fields.items():
            yield f"{path}.{name}".lstrip("."), field


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
