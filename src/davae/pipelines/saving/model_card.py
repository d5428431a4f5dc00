"""The model card of a saved pipeline, autoencoder or adapter: what it is, how to use it, figures, how it was made."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import yaml
from safetensors import safe_open

from davae.errors import DavaeError
from davae.pipelines.families import find_family
from davae.pipelines.saving.licence import Licence, find_licence
from davae.pipelines.saving.opening import LAYERS_FILE
from davae.pipelines.saving.publishing import public_command, public_name, public_text, public_values
from davae.recipes.yaml_text import plain_yaml
from davae.runtime.atomic_files import atomic_write
from davae.runtime.console import printable, shown
from davae.runtime.text_files import read_object
from davae.version import __version__

CARD = "README.md"
_FULL = "`height` and `width` mean the full resolution."
_USE = {
    "pipeline": """
With davae installed, either of

```python
import davae

pipe = davae.load_pipeline("{name}")
```

```python
import davae  # is enough for diffusers to know the autoencoder
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}")
```

Without davae, with the code in this repository (`vae/davae.py`):

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{name}"{custom}, trust_remote_code=True)
```

{sizes}
""",
    "autoencoder": """
With davae installed:

```python
import davae

vae = davae.AutoencoderDA.from_pretrained("{name}")
```

Without it, with the code in this repository (`davae.py`):

```python
from diffusers import AutoModel

vae = AutoModel.from_pretrained("{name}", trust_remote_code=True)
```
""",
    "adapters": """
```python
import davae
from diffusers import DiffusionPipeline

base = DiffusionPipeline.from_pretrained("{base}")
pipe = davae.load_adapters(base, None, "{name}")  # a folder, or the name on the hub
```

The LoRA alone is not enough: the input and output layers with the detail channels are in `{layers}`.
""",
    "comfyui": """
With davae's nodes for ComfyUI. Copy the folders here into `models` of ComfyUI:

{files}
""",
}


@dataclass(frozen=True)
class Making:
    """How a model was made: what its folder does not record.

    Attributes:
        figures: measured values by name; nested mappings become dotted names.
        commands: the exact commands, in order.
        hardware: device and versions, by name.
        datasets: hub names of the data sets it was trained on.
        recipe: text of the resolved recipe.
        pictures: names of pictures in the folder, with what they show.
    """

    figures: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[str] = ()
    hardware: Mapping[str, Any] = field(default_factory=dict)
    datasets: Sequence[str] = ()
    recipe: str | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)

    def public(self) -> Making:
        """A copy without private paths, see :mod:`davae.pipelines.saving.publishing`."""
        return replace(
            self,
            commands=[public_command(command) for command in self.commands],
            hardware=public_values(dict(self.hardware)),
            datasets=[public_name(name) for name in self.datasets],
            recipe=None if self.recipe is None else _public_recipe(self.recipe),
        )


def _public_recipe(text: str) -> str:
    try:
        values = plain_yaml(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        return public_text(text)
    cut = public_values(values)
    if isinstance(cut.get("base"), str):
        cut["base"] = public_name(cut["base"])
    return text if cut == values else yaml.safe_dump(cut, sort_keys=False)


def write_model_card(
    folder: str | Path,
    *,
    base_model: str,
    license: str | Licence | None = None,
    making: Making | None = None,
    name: str | None = None,
    files: Sequence[Path] = (),
    out: Path | None = None,
) -> Path:
    """Write ``README.md`` into a folder that davae saved. Private paths in it are shortened to their last part.

    Args:
        folder: of an upgraded pipeline, an autoencoder or adapters.
        base_model: hub name or folder of the base.
        license: of the result; the base's own if None, see :func:`davae.pipelines.saving.licence.find_licence`.
        making: figures and commands.
        name: under which the result is or will be published; the folder's name if None.
        files: single files for ComfyUI that the card is about, relative to ``out``.
        out: the folder of the card; ``folder`` if None.

    Returns:
        The path of the card.

    Raises:
        DavaeError: the licence is not known, or the folder contains none of the three.
    """
    folder = Path(folder)
    licence = find_licence(base_model, license)
    facts = _Facts.of(folder)
    facts = replace(facts, files=tuple(file.as_posix() for file in files))
    text = _card(facts, name or folder.resolve().name, public_name(base_model), licence, (making or Making()).public())
    card = (out or folder) / CARD
    atomic_write(card, text)
    return card


@dataclass(frozen=True)
class _Facts:
    """What the card takes from the folder's own files."""

    kind: str  # "pipeline", "autoencoder" or "adapters"
    class_name: str
    base_channels: int
    detail_channels: int
    scale: int
    pixels: int | None  # per latent position and side
    task: str | None
    own_pipeline: bool = False  # the pipeline's class is not part of diffusers
    files: tuple[str, ...] = ()  # single files for ComfyUI

    @classmethod
    def of(cls, folder: Path) -> _Facts:
        if (folder / LAYERS_FILE).is_file():
            with safe_open(folder / LAYERS_FILE, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["davae"])
            counts = header["base_channels"], header["detail_channels"], header["scale"]
            return cls("adapters", header["pipeline"], *counts, None, _task(header["pipeline"], text=True))
        if (folder / "model_index.json").is_file():
            index = read_object(folder / "model_index.json")
            text = any(part.startswith("tokenizer") for part in index)
            name = index["_class_name"]
            facts = cls._with("pipeline", name, folder / "vae" / "config.json", _task(name, text=text))
            return replace(facts, own_pipeline=(folder / "pipeline.py").is_file())
        return cls._with("autoencoder", "AutoencoderDA", folder / "config.json", None)

    @classmethod
    def _with(cls, kind: str, name: str, config_file: Path, task: str | None) -> _Facts:
        config = read_object(config_file) if config_file.is_file() else {}
        if config.get("_class_name") != "AutoencoderDA":
            raise DavaeError(f"{config_file.parent} holds no AutoencoderDA: model cards are for models of davae")
        pixels = 2 ** (len(config["block_out_channels"]) - 1)
        details, scale = config["detail_channels"], config["scale"]
        below = config
        while below["base_class"] == "AutoencoderDA":  # a further level of details
            below = below["base_config"]
            details, scale = details + below["detail_channels"], scale * below["scale"]
        return cls(kind, name, config["latent_channels"] - details, details, scale, pixels, task)


def _task(class_name: str, *, text: bool) -> str:
    """The hub's name for the pipeline's task."""
    family, pipeline = find_family(class_name), getattr(diffusers, class_name, None)
    if family.edits_images or (pipeline and "strength" in inspect.signature(pipeline.__call__).parameters):
        return "image-to-image"
    return "text-to-image" if text and family.conditioned_on == "text" else "unconditional-image-generation"


def _card(facts: _Facts, name: str, base_model: str, licence: Licence, making: Making) -> str:
    entries: dict[str, Any] = {
        "library_name": "diffusers",
        **licence.front_matter(),
        "base_model": base_model,
        "base_model_relation": "adapter" if facts.kind == "adapters" else "finetune",
    }
    if facts.task:
        entries["pipeline_tag"] = facts.task
    entries["tags"] = ["davae", "autoencoder", *(["lora"] if facts.kind == "adapters" else [])]
    if making.datasets:
        entries["datasets"] = list(making.datasets)
    head = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{head}---",
        f"# {_plain(Path(name).name)}\n\n{_introduction(facts, base_model)}",
        f"## Use\n\n{_use(facts, name, base_model)}",
        _gallery(making.pictures),
        _figures(making.figures),
        _making(making),
        f"## Licence\n\nThe base's licence applies to this model too: {_named(licence)}.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _introduction(facts: _Facts, base_model: str) -> str:
    what = {
        "pipeline": f"A `{facts.class_name}` upgraded with davae",
        "autoencoder": "A detail-aligned autoencoder made with davae",
        "adapters": f"LoRA and widened layers for a `{facts.class_name}` upgraded with davae",
    }[facts.kind]
    latent = (
        f"Its latent has {facts.base_channels} base channels, those of the base's own autoencoder, and "
        f"{facts.detail_channels} detail channels"
    )
    grid = f"; one latent position stands for {facts.pixels} x {facts.pixels} pixels" if facts.pixels else ""
    return (
        f"{what}.\nBase: {_code(base_model)}. It makes {facts.scale} times the base's resolution per side from the "
        f"same number of tokens.\n{latent}{grid}."
    )


def _use(facts: _Facts, name: str, base_model: str) -> str:
    custom = ', custom_pipeline="pipeline"' if facts.own_pipeline else ""
    name, base = (printable(json.dumps(text, ensure_ascii=False)[1:-1]) for text in (name, base_model))
    values = {"name": name, "base": base, "custom": custom, "layers": LAYERS_FILE, "sizes": _sizes(facts)}
    values["files"] = "\n".join(f"* {_code(file)}" for file in facts.files)
    return _USE["comfyui" if facts.files else facts.kind].format(**values).strip()


def _sizes(facts: _Facts) -> str:
    """How ``height`` and ``width`` work with plain diffusers, for classes with constants or lists of sizes."""
    sizes = find_family(facts.class_name).sizes
    if sizes == "fixed":
        return (
            f"{_FULL} `davae.load_pipeline` ensures this; otherwise this class assumes 8 pixels per latent position: "
            f"ask for the base's size, and the image is {facts.scale} times as large per side."
        )
    if sizes == "listed":
        return (
            f"{_FULL} `davae.load_pipeline` ensures this; otherwise this class rounds sizes to a list for the base: "
            "pass `use_resolution_binning=False`."
        )
    return _FULL


def _gallery(pictures: Mapping[str, str]) -> str:
    shown = [f"![{_plain(what)}](<{name}>)" for name, what in pictures.items()]
    return "\n\n".join(["## Samples", *shown]) if shown else ""


def _figures(figures: Mapping[str, Any]) -> str:
    rows = [f"| {_plain(name)} | {_shown(value)} |" for name, value in _flat(figures)]
    return "\n".join(["## Figures\n", "| figure | value |", "|---|---|", *rows]) if rows else ""


def _flat(figures: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float):
            found.append((f"{prefix}{key}", value))
    return found


def _shown(value: float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _making(making: Making) -> str:
    parts = []
    if making.commands:
        parts.append(textwrap.indent("\n".join(map(printable, making.commands)), "    ", lambda _: True))
    hardware = {"davae": __version__, **making.hardware}
    parts.append("With " + ", ".join(_plain(f"{key} {value}") for key, value in hardware.items()) + ".")
    if making.recipe:
        recipe = printable(making.recipe.strip())
        fence = _fence(recipe, 3)
        parts.append(f"<details><summary>The resolved recipe</summary>\n\n{fence}yaml\n{recipe}\n{fence}\n\n</details>")
    return "## How it was made\n\n" + "\n\n".join(parts)


def _named(licence: Licence) -> str:
    link = re.sub(r"[<>\s]", "", licence.link or "")
    return f"[{_plain(licence.title)}](<{link}>)" if link else _plain(licence.title)


def _plain(text: str) -> str:
    """A text on one line of Markdown, also in a table, that shows as it is."""
    return re.sub(r"[\\`*\[\]<>|~]", r"\\\g<0>", shown(text))


def _code(text: str) -> str:
    fence = _fence(text, 1)
    return f"{fence} {shown(text)} {fence}" if "`" in text else f"`{shown(text)}`"


def _fence(text: str, least: int) -> str:
    """Backticks that end nowhere in a text."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])
