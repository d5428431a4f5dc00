"""Configurations of well-known pipelines, without weights, for `davae plan` and dry runs without a network.

One JSON file per pipeline. ``transformer``, ``vae`` and ``text_encoders`` are the entries of the pipeline's
``config.json`` files that determine the model; a test checks ``parameters`` against the built model.
"""

import json
import os
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class License:
    """The licence of a base, which is inherited by what is derived from it.

    Attributes:
        id: as on the hub.
        name: in words.
        link: address of its text.
    """

    id: str
    name: str
    link: str

    def __str__(self) -> str:
        return f"{self.name} ({self.link})"


@dataclass(frozen=True)
class Preset:
    """The configuration of a published pipeline.

    Attributes:
        key: short name, that of the file.
        name: on the hub.
        pipeline: class name of the pipeline.
        resolution: side of the image that the base was published for, in pixels.
        license: of the weights.
        source: where the values come from.
        transformer_parameters: number of parameters of the transformer.
        published: the size as its authors state it.
        steps: denoising steps, if not the pipeline's default.
        transformer, vae: configurations with ``_class_name``.
        text_encoders: configurations in the form of transformers, by component name.
    """

    key: str
    name: str
    pipeline: str
    resolution: int
    license: License
    source: str
    transformer_parameters: int
    published: str
    steps: int | None
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: dict[str, dict[str, Any]]


def preset_names() -> list[str]:
    """Short names of the bundled configurations."""
    folder = resources.files(__name__)
    return sorted(p.name.removesuffix(".json") for p in folder.iterdir() if p.name.endswith(".json"))


def find_preset(name: str) -> Preset | None:
    """The preset of a short name or of a name on the hub, in any case; None if there is none or if a path has it."""
    if os.path.exists(name):
        return None
    wanted = name.lower()
    for preset in _presets():
        if wanted in (preset.key, preset.name.lower()):
            return preset
    return None


@cache
def _presets() -> tuple[Preset, ...]:
    return tuple(_read(key) for key in preset_names())


def _read(key: str) -> Preset:
    values = json.loads((resources.files(__name__) / f"{key}.json").read_text(encoding="utf-8"))
    return Preset(
        key=key,
        name=values["name"],
        pipeline=values["pipeline"],
        resolution=values["resolution"],
        license=License(**values["license"]),
        source=values["source"],
        transformer_parameters=values["parameters"]["transformer"],
        published=values["parameters"]["published"],
        steps=values.get("steps"),
        transformer=values["transformer"],
        vae=values["vae"],
        text_encoders=values["text_encoders"],
    )
