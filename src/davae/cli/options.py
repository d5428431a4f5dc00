"""Options that several commands share, checks made before any work, and writing of results as JSON."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from davae.errors import DavaeError
from davae.runtime.atomic_files import atomic_json
from davae.runtime.places import KindName, check_place, check_writable
from davae.runtime.text_files import read_object


def new_file(file: Path | None) -> Path | None:
    """Check that a file can be written, before hours of work whose result would be lost.

    Raises:
        DavaeError: it is a folder, or no file can be created there.
    """
    if file is None:
        return None
    if os.path.isdir(file):
        raise DavaeError(f"{file} is a folder, and a file is to be written: add a file name")
    check_writable(file)
    return file


def figures_file(file: Path | None) -> Path | None:
    """A file for figures: new, or one with figures, which are written anew.

    Raises:
        DavaeError: as :func:`new_file`, or it holds something else, such as a model's configuration.
    """
    new_file(file)
    if file is not None and os.path.isfile(file):
        try:
            ours = not {"_class_name", "model_type", "weight_map"} & read_object(file).keys()
        except DavaeError:
            ours = os.path.getsize(file) == 0
        if not ours:
            raise DavaeError(f"--json {file}: that file holds something else than figures: name another")
    return file


def folder_of(kind: KindName) -> Callable[[Path | None], Path | None]:
    """An option's callback that checks, before any work, whether a folder can take a kind of output.

    Raises:
        DavaeError: from the callback: a file, a folder that is not writable, or one that holds something else.
    """

    def check(folder: Path | None) -> Path | None:
        if folder is not None:
            check_place(folder, kind)
        return folder

    return check


def base_and_overrides(texts: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Split arguments into the name of a base, if there is one, and a recipe's ``section.key=value``.

    Raises:
        DavaeError: there are two names.
    """
    names = [text for text in texts or () if "=" not in text]
    if len(names) > 1:
        raise DavaeError(f"one base at a time: {names[0]} or {names[1]}")
    return (names[0] if names else None), [text for text in texts or () if "=" in text]


def named_values(texts: Sequence[str] | None, option: str, example: str) -> dict[str, str]:
    """Parse the values of a repeatable option ``NAME=VALUE``, by name.

    Raises:
        DavaeError: one has another form, or a name is given twice; the message names the option, with an example.
    """
    found: dict[str, str] = {}
    for text in texts or ():
        name, _, value = text.partition("=")
        if not name or not value:
            raise DavaeError(f"{option} {text}: write NAME=..., such as {example}")
        if name in found:
            raise DavaeError(f"{option}: the name '{name}' is given twice")
        found[name] = value
    return found


def upscalers_of(texts: Sequence[str] | None) -> dict[str, str]:
    """The values of ``--upscaler``, by name."""
    return named_values(texts, "--upscaler", "esrgan=RealESRGAN_x2plus.safetensors")


def installed(package: str, extra: str) -> None:
    """Check that an optional package is there, before anything else is imported.

    Raises:
        DavaeError: it is not; the message says how to install it.
    """
    if importlib.util.find_spec(package) is None:
        raise DavaeError(f"{package} is not installed: pip install 'davae[{extra}]'")


def some_images(path: str | None) -> str | None:
    """Check that a path of images exists.

    Raises:
        DavaeError: there is no such folder or file.
    """
    from davae.recipes.data import check_data_path

    if path is not None:
        check_data_path(path)
    return path


def check_recipe(
    recipe: str, overrides: Sequence[str] | None, *, images: bool = True, stages: Sequence[str] = ()
) -> None:
    """Check a recipe before the (slow) import of what trains from it.

    Args:
        recipe, overrides: as given.
        images: whether the images must exist.
        stages: the sections to be trained.

    Raises:
        DavaeError: no such recipe, an unknown key, a bad value, nothing at ``data.path``, or unsuitable settings of a
            stage.
    """
    from davae.recipes.checks import check_settings
    from davae.recipes.data import check_data_paths
    from davae.recipes.read import load_recipe
    from davae.recipes.settings import AblationRecipe

    settings = load_recipe(recipe, overrides or (), stage=stages[0] if len(stages) == 1 else None)
    if isinstance(settings, AblationRecipe):
        return
    for stage in stages:
        if hasattr(settings, stage):
            check_settings(settings, stage)
    if images:
        check_data_paths(settings.data)


def write_figures(file: Path | None, values: dict[str, Any]) -> None:
    """Write results as JSON, if a file was given."""
    if file is not None:
        atomic_json(file, values)


Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda or cuda:1 (default: the GPU, if any).")]
ModelDType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, bfloat16 or float16 (default: as saved)."),
]
Upscalers = Annotated[
    list[str] | None,
    typer.Option(
        "--upscaler",
        help="NAME=FILE.safetensors (spandrel) or NAME=FOLDER (an upscaling pipeline of diffusers) that enlarges the "
        "base's images, to compare with; can be given again.",
    ),
]
Variant = Annotated[
    str | None,
    typer.Option("--variant", help="Of the pipeline's files, such as fp16 (default: those without, or the only one)."),
]
DType = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")]
FeatureNames = Annotated[
    list[str] | None,
    typer.Option(
        "--features", help="inception, inception:FILE, efficientnet-lite0, or a transformers model; can be given again."
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write all results to this file.", callback=figures_file)]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides as section.key=value, e.g. data.path=photos/")]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name, or a YAML file.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Rounds of timing; medians are shown.")]
TrainedAutoencoder = Annotated[
    Path | None, typer.Option("--autoencoder", help="Folder of the trained autoencoder (default: stage 1's result).")
]
