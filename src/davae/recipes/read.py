"""Reading recipes: YAML by name or file, overrides as ``key=value``, errors in one line."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from davae.errors import DavaeError
from davae.recipes.dc_ae import DcAeRecipe
from davae.recipes.loop import MAY_CHANGE, MAY_MOVE, Section
from davae.recipes.settings import AblationRecipe, BaseRecipe, UpgradeRecipe
from davae.recipes.yaml_text import Plain, field_of, parse_yaml, read_text, takes_text, typed
from davae.runtime.atomic_files import atomic_write

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


def recipe_table() -> str:
    """Name, kind and description of each recipe that comes with davae, one a line."""
    recipes = [(name, load_recipe(name)) for name in recipe_names()]
    width = max(len(name) for name, _ in recipes)
    return "\n".join(f"{name:<{width}}  {recipe.kind:<8}  {recipe.description}" for name, recipe in recipes)


def demo_recipe(base: str | None) -> str:
    """The recipe of ``davae demo`` where none is named, with the embedded base or over another."""
    return "tiny" if base is None else "taesd3-photos"


def recipe_text(name: str) -> str:
    """The file of a recipe that comes with davae, comments included.

    Raises:
        DavaeError: there is none of that name.
    """
    if name not in recipe_names():
        raise DavaeError(
            f"no recipe named '{name}'{_nearest(name, recipe_names())}; `davae recipes list` shows all, or give a "
            ".yaml file"
        )
    return (resources.files("davae.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def write_recipe(text: str, file: Path) -> Path:
    """Write a recipe to a new file and return it, with ``.yaml`` added to a name without it.

    Raises:
        DavaeError: the file exists.
    """
    file = file if file.suffix.lower() in {".yaml", ".yml"} else file.with_name(f"{file.name}.yaml")
    if file.exists():
        raise DavaeError(f"{file} exists: name another file, or remove it")
    atomic_write(file, text)
    return file


def load_recipe(name_or_file: str | Path, overrides: Sequence[str] = (), *, stage: str | None = None) -> Recipe:
    """Read a recipe by name (``tiny``) or from a YAML file and apply ``section.key=value`` overrides.

    Args:
        name_or_file: name of a bundled recipe, or a YAML file.
        overrides: values are converted by the type of the field; a text field takes the text as it is.
        stage: the section that is trained, such as ``diffusion``; hints prefer its keys.

    Raises:
        DavaeError: no such recipe, not YAML, an unknown key (with the nearest known one), or a bad value.
    """
    path = Path(name_or_file)
    if path.suffix.lower() in {".yaml", ".yml"}:
        text, source = read_text(path), str(path)
    else:
        text, source = recipe_text(str(name_or_file)), f"recipe '{name_or_file}'"
    values = parse_yaml(text, source)
    if not isinstance(values, dict):
        raise DavaeError(f"{source} must hold sections with keys, not {_kind_of(values)}")
    for override in overrides:
        _apply_override(values, override)
    return parse_recipe(values, source, stage=stage)


def load_ablation(name_or_file: str | Path, overrides: Sequence[str] = ()) -> AblationRecipe:
    """:func:`load_recipe` for an ablation; its variants are read too.

    Overrides of keys that only the upgrade recipe has, such as ``data.path=...``, are for every variant.

    Raises:
        DavaeError: as there, for the ablation or one of its variants, or the recipe is of another kind.
    """
    of_variants = [
        o for o in overrides if re.split("[.=]", o)[0] in UpgradeRecipe.model_fields.keys() - {"kind", "description"}
    ]
    recipe = load_recipe(name_or_file, [o for o in overrides if o not in of_variants])
    if not isinstance(recipe, AblationRecipe):
        raise DavaeError(f"recipe '{name_or_file}' is of kind '{recipe.kind}', not an ablation")
    recipe = recipe.model_copy(update={"overrides": (*recipe.overrides, *of_variants)})
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


def parse_recipe(values: dict[str, Any], source: str, *, stage: str | None = None) -> Recipe:
    """Validate plain values into the typed recipe of their ``kind``.

    Args:
        values: sections and keys.
        source: their name in errors.
        stage: as for :func:`load_recipe`.

    Raises:
        DavaeError: the first mistake, in one line.
    """
    kind = values.get("kind", "upgrade")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DavaeError(f"{source}: kind is {_shown(kind)}; known kinds are {', '.join(KINDS)}")
    try:
        return KINDS[kind].model_validate(typed(values, KINDS[kind]))
    except ValidationError as error:
        raise DavaeError(_one_line(error, KINDS[kind], source, stage)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, with all defaults."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def with_later_settings(dumped: dict[str, Any]) -> dict[str, Any]:
    """A recipe dumped by an earlier version, with settings that were added since at their defaults.

    If it is not valid today (because a setting was removed, for example), it is returned unchanged.
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
    """A section and all its subsections, each with its dotted path (empty for the first)."""
    yield path, model
    for name, field in model.model_fields.items():
        for part in _sections_in(field.annotation):
            yield from sections_of(part, f"{path}.{name}".lstrip("."))


def resumable_keys(kind: str) -> set[str]:
    """Dotted names of the settings that may have other values when a run of such a recipe resumes."""
    model = KINDS.get(kind)
    return {key for key, field in _dotted_fields(model) if MAY_CHANGE in field.metadata} if model else set()


def movable_keys(kind: str) -> set[str]:
    """Dotted names of the settings that are paths; a resumed run may find the same contents elsewhere."""
    model = KINDS.get(kind)
    return {key for key, field in _dotted_fields(model) if MAY_MOVE in field.metadata} if model else set()


def differing_keys(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """The values in which two dumped recipes differ, as ``key: theirs -> ours``."""
    found = []
    for key in [*ours, *(k for k in theirs if k not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differing_keys(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {b} -> {a}")
    return found


def flatten(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Nested mappings as rows with dotted names."""
    rows: list[tuple[str, object]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", value))
    return rows


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        named = override in recipe_names() or override.endswith((".yaml", ".yml"))
        meant = f"; did you mean --recipe {override}?" if named else ""
        raise DavaeError(f"override {_shown(override)} is not of the form section.key=value{meant}")
    annotation = _annotation_of(values, key)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if takes_text(annotation) and not quoted:
        value: Any = Plain(text)
    else:
        value = parse_yaml(text, f"the value of override {_shown(override)}")
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        if inner is None or inner == "":  # a section without keys
            inner = values[section] = {}
        if not isinstance(inner, dict):
            raise DavaeError(f"override {_shown(override)}: '{section}' is a value, not a section")
        values = inner
    values[last] = value


def _annotation_of(values: dict[str, Any], key: str) -> Any:
    """The type of the field with a dotted key; ``None`` if there is no such field."""
    model = KINDS.get(str(values.get("kind", "upgrade")))
    sections: list[type[Section]] = [] if model is None else [model]
    annotation = None
    for name in key.split("."):
        field = field_of(sections, name)
        if field is None:
            return None
        annotation = field.annotation
        sections = list(_sections_in(annotation))
    return annotation


def _one_line(error: ValidationError, model: type[Section], source: str, stage: str | None) -> str:
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        return f"{source}: unknown key '{where}'{_hint(where, first['input'], model, stage)}"
    if first["type"] == "missing":
        return f"{source}: '{where}' is missing"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    if first["type"] == "literal_error":
        where = re.sub(r"\.\d+$", "", where)  # an item that is quoted needs no number
        message += _nearest(str(first["input"]), re.findall(r"'([^']*)'", message))
    if first["type"] == "value_error" and isinstance(first["input"], dict):  # of a section: names its keys
        return f"{source}: {message}" if where in ("", "data") else f"{source}: '{where}': {message}"
    return f"{source}: '{where}' is {_shown(first['input'])}: {message}"


_SHOWN = 80


def _shown(value: Any) -> str:
    """A value for an error, truncated if long."""
    if isinstance(value, dict | list) and len(value) > _SHOWN:
        return f"{_kind_of(value)} of {len(value)}"
    text = repr(str(value) if isinstance(value, str) else value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _kind_of(value: Any) -> str:
    """The kind of a value, for errors."""
    if value is None:
        return "nothing"
    return "a list" if isinstance(value, list) else "sections" if isinstance(value, dict) else "a single value"


_MEANT = {
    name: ours
    for ours, theirs in {
        "learning_rate": "lr rate",
        "weight_decay": "wd",
        "lr_scheduler": "scheduler",
        "lr_warmup_steps": "warmup warmup_steps lr_warmup",
        "betas": "adam_beta1",
        "eps": "adam_epsilon",
        "batch_size": "batch train_batch_size per_device_train_batch_size",
        "gradient_accumulation": "gradient_accumulation_steps grad_accum accumulation",
        "precision": "mixed_precision dtype",
        "steps": "max_train_steps max_steps num_steps iterations epochs num_train_epochs",
        "max_grad_norm": "grad_clip clip clip_grad_norm",
        "ema_decay": "ema",
        "checkpoint_every": "checkpointing_steps save_every save_steps",
        "checkpoints_total_limit": "save_total_limit",
        "validate_every": "validation_steps eval_every eval_steps",
        "log_every": "logging_steps",
        "report_to": "log_with tracker",
        "workers": "num_workers dataloader_num_workers",
        "path": "dataset data_dir train_data_dir dataset_name folder",
        "flip": "random_flip horizontal_flip",
        "resolution": "size image_size",
        "base": "model pretrained_model_name_or_path",
        "rank": "lora_rank r",
        "alpha": "lora_alpha",
        "targets": "target_modules",
        "max_length": "max_sequence_length text_length",
        "min_snr_gamma": "snr_gamma",
        "guidance_scale": "cfg guidance",
        "validation": "validation_prompt validation_prompts",
        "validation_images": "num_validation_images",
        "compile": "torch_compile",
        "seed": "random_seed",
        "start_from": "resume_from init_from",
    }.items()
    for name in theirs.split()
}
"""Names of settings in other trainers, and their names here."""


def _hint(where: str, value: Any, model: type[Section], stage: str | None) -> str:
    """Suggest keys for an unknown one: those with the same name, the same meaning, or a similar spelling.

    Of several, those that share most sections with the unknown key, or belong to the stage that is trained, are chosen;
    less nested ones first.
    """
    while isinstance(value, dict) and value:  # the first section is unknown: what was written in it says more
        name, value = next(iter(value.items()))
        where = f"{where}.{name}"
    known = [key for key, _ in _dotted_fields(model)]
    *written, name = where.split(".")
    names = {key: key.rpartition(".")[2] for key in known}
    meant = _MEANT.get(name.lower(), name)
    fitting = [key for key in known if names[key] == name] or [key for key in known if names[key] == meant]
    if not fitting:
        siblings = [key for key in known if key.rpartition(".")[0] == ".".join(written)]
        near = difflib.get_close_matches(where, siblings, n=1, cutoff=0.6)
        close = difflib.get_close_matches(name, set(names.values()), n=1, cutoff=0.7)
        fitting = near or [key for key in known if names[key] in close]
    if not fitting and written:
        return _hint(".".join(written), None, model, stage)
    if not fitting:
        return f"; known here: {', '.join(key for key in known if '.' not in key)}"

    def distance(key: str) -> tuple[int, int, int]:
        sections = key.split(".")[:-1]
        shared = sum(difflib.SequenceMatcher(None, a, b).ratio() > 0.8 for a in written for b in sections)
        foreign = bool(stage) and "." in key and sections[0] not in (stage, "data")
        return -shared, int(foreign), len(sections)

    best = min(map(distance, fitting))
    chosen = [f"'{key}'" for key in fitting if distance(key) == best]
    return f"; did you mean {' or '.join(chosen[:3])}?"


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The sections that a field may hold."""
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            yield part


def _dotted_fields(model: type[Section]) -> Iterator[tuple[str, FieldInfo]]:
    for path, section in sections_of(model):
        for name, field in section.model_fields.items():
            yield f"{path}.{name}".lstrip("."), field


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
