"""Opening base pipelines by name: embedded, random, from a folder, a finished run, or the hub."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from huggingface_hub import snapshot_download

from davae.bases.tiny import debug_base, load_tiny
from davae.errors import DavaeError
from davae.models.latent_space import autoencoder_class
from davae.pipelines.saving.opening import (
    TEXT_ENCODERS,
    hub_name,
    is_model_alone,
    open_pipeline,
    opening,
    pipeline_place,
    published_files,
)
from davae.recipes.presets import find_preset
from davae.recipes.settings import UpgradeRecipe
from davae.runtime.model_files import open_model
from davae.runtime.package_files import TINY, TINY_UPGRADED
from davae.runtime.text_files import read_object

EVERYTHING = ("vae", "transformer", TEXT_ENCODERS)
"""The parts of a base that hold weights, see :func:`load_base`."""


def built_in(name: str) -> DiffusionPipeline | None:
    """The embedded base (``tiny``), its upgrade, or a random base (``debug``, ``debug-sd3``); None for other names."""
    if name in (TINY, TINY_UPGRADED):
        return load_tiny(name)
    if name == "debug":
        return debug_base()
    if not is_built_in(name):
        return None
    from davae.bases.debug_pipelines import small_pipeline

    return small_pipeline(name.removeprefix("debug-"))


def is_built_in(name: str) -> bool:
    """Whether a pipeline comes with davae; otherwise a folder comes before a bundled configuration and the hub."""
    return name in (TINY, TINY_UPGRADED, "debug") or name.startswith("debug-")


def load_recipe_base(
    recipe: UpgradeRecipe, *, without: Collection[str] = (), transformer_dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """The base that a recipe names, at the revision that it pins; ``without`` as in :func:`load_base`."""
    return load_base(
        recipe.base,
        revision=recipe.base_revision,
        variant=recipe.base_variant,
        remote_code=recipe.base_remote_code,
        without=without,
        transformer_dtype=transformer_dtype,
    )


def load_recipe_autoencoder(recipe: UpgradeRecipe) -> Any:
    """The autoencoder of a recipe's base, see :func:`load_base_autoencoder`."""
    return load_base_autoencoder(recipe.base, revision=recipe.base_revision, variant=recipe.base_variant)


def load_base_autoencoder(name: str, *, revision: str | None = None, variant: str | None = None) -> Any:
    """The autoencoder of a base, in float32; nothing else is read or downloaded.

    Args:
        name: of a pipeline, or of an autoencoder by itself: built in, a folder, or on the hub.
        revision, variant: as in :func:`load_base`.

    Raises:
        DavaeError: there is none, it is of an unknown class, or its files are missing, damaged or pickles.
    """
    if is_built_in(name):
        return load_base(name, revision=revision, variant=variant).vae
    name = _published_name(name, revision)
    with _named_causes(name, name, remote_code=False), opening("base", name):
        place, subfolder = _autoencoder_place(name, revision, weights=True)
        folder = str(place / subfolder)
        with opening("autoencoder", folder):
            class_name = str(AutoencoderKL.load_config(folder).get("_class_name"))
            model_class = autoencoder_class(class_name)
            if model_class is None:
                raise DavaeError(f"{folder} holds a model of class {class_name}, which is no autoencoder davae knows")
            options: dict[str, Any] = {} if variant is None else {"variant": variant}
            options |= {"dtype": torch.float32, "use_safetensors": True}
            return open_model(model_class.from_pretrained, folder, **options)[0]


def _published_name(name: str, revision: str | None) -> str:
    """A folder, or the name on the hub, which a bundled configuration's short name stands for.

    Raises:
        DavaeError: the base is published as checkpoint files, or a revision of a folder is asked for.
    """
    preset = find_preset(name)
    if preset is not None and preset.pipeline == "ClassConditionalPipeline":
        raise DavaeError(
            f"'{name}' is published as checkpoint files, not as a pipeline: convert them with `davae convert vavae` "
            "and `davae convert lightningdit --vae`, and give the folder; see docs/imagenet.md"
        )
    if revision is not None and Path(name).is_dir():
        raise DavaeError(f"base_revision is set, but {name} is a folder; revisions are of names on the hub")
    return name if preset is None else preset.name


def _autoencoder_place(name: str, revision: str | None, *, weights: bool) -> tuple[Path, str]:
    """The folder of a base, and that of its autoencoder in it: ``vae``, or empty for an autoencoder by itself.

    Of a name on the hub only that is downloaded; without ``weights`` only descriptions.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        fetch = partial(snapshot_download, hub_name("pipeline", name), revision=revision)
        folder = Path(fetch(allow_patterns=["model_index.json", "config.json", "transformer/config.json"]))
        inside = "" if is_model_alone(folder) else "vae/"
        if weights:
            fetch(allow_patterns=[f"{inside}config.json", f"{inside}diffusion_pytorch_model*.safetensors*"])
    return (folder, "") if is_model_alone(folder) else (Path(pipeline_place(folder)), "vae")


def is_pipeline(name: str, revision: str | None = None) -> bool:
    """Whether a base is a whole pipeline, as opposed to an autoencoder by itself.

    Raises:
        DavaeError: neither is there.
    """
    return is_built_in(name) or describe_pipeline(name, revision) is not None


def describe_pipeline(name: str, revision: str | None = None) -> tuple[str, dict[str, Any]] | None:
    """Class name and transformer's configuration of a pipeline that is a folder or on the hub; no weights are read.

    Returns:
        The configuration is empty where the pipeline has no transformer; None for an autoencoder by itself.

    Raises:
        DavaeError: neither is there.
    """
    name = _published_name(name, revision)
    with opening("base", name):
        place, inside = _autoencoder_place(name, revision, weights=False)
        if not inside:
            return None
        config = place / "transformer" / "config.json"
        transformer = read_object(config) if config.is_file() else {}
        return str(read_object(place / "model_index.json").get("_class_name")), transformer


def load_base(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    remote_code: bool | None = None,
    without: Collection[str] = (),
    transformer_dtype: torch.dtype | None = None,
    dtype: torch.dtype | Literal["saved", "parts"] | None = None,
) -> DiffusionPipeline:
    """Open a pipeline by name: embedded, built in code, from a folder, a finished run, or the hub.

    Args:
        name: ``tiny``, ``tiny-upgraded``, ``debug``, ``debug-sd3`` and similar, a folder, or a hub name.
        revision: of a hub name: branch, tag or commit; by default the newest.
        variant: of the weights' files, such as ``fp16`` in ``model.fp16.safetensors``; by default the files without
            one, or, if there are none, the only variant.
        remote_code: whether Python files beside the weights may be executed, from the recipe; ``None`` means no, for
            callers without a recipe.
        without: parts whose weights are not needed, see :func:`davae.pipelines.saving.opening.open_pipeline`.
        transformer_dtype: of the transformer alone; it is loaded in this type directly, since a large one would not
            fit twice.
        dtype: of all parts; ``saved`` is that of the saved transformer, ``parts`` for each part its own. By default
            float32, with text encoders as they were saved.

    Raises:
        DavaeError: there is none of that name; files are missing, damaged or incomplete; there are several variants
            and none was chosen; the base has code and ``remote_code`` is off; its weights are pickles; or a revision
            is given for a folder.
    """
    pipe = built_in(name)
    if pipe is not None:
        if transformer_dtype is not None:
            pipe.transformer.to(transformer_dtype)
        pipe = pipe if dtype is None or isinstance(dtype, str) else pipe.to(dtype)
        return _emptied(pipe, without)
    name = _published_name(name, revision)
    options: dict[str, Any] = {"use_safetensors": True}
    if transformer_dtype is not None:
        options["dtype"] = {"transformer": transformer_dtype}
    if revision is not None:
        options["revision"] = revision
    if remote_code:
        options["trust_remote_code"] = True
    if variant is not None:
        options["variant"] = variant
    if dtype is not None:
        options["dtype"] = dtype
    path_or_repo = pipeline_place(name)
    with _named_causes(name, path_or_repo, remote_code=remote_code):
        return open_pipeline(path_or_repo, without=without, **options)


def _emptied(pipe: DiffusionPipeline, without: Collection[str]) -> DiffusionPipeline:
    """A pipeline without the weights of some parts, as :func:`open_pipeline` opens it."""
    for name, part in pipe.components.items():
        if name in without and name in ("vae", "transformer"):
            part.to("meta")
        elif name in without or (name.startswith("text_encoder") and TEXT_ENCODERS in without):
            pipe.register_modules(**{name: None})
    return pipe


@contextmanager
def _named_causes(name: str, path_or_repo: str, *, remote_code: bool | None) -> Iterator[None]:
    """Say what to do about weights in pickles, and about a base with code of its own."""
    try:
        yield
    except DavaeError as error:
        files = published_files(path_or_repo, error)
        if "safetensors" not in str(error) or not any(file.endswith(_PICKLES) for file in files):
            raise
        raise DavaeError(
            f"the base {name} has weights that are not safetensors but pickles, which can run code when they are read "
            f"({error}). Where you trust them, convert them once: "
            f"DiffusionPipeline.from_pretrained({name!r}).save_pretrained('FOLDER'), then base: FOLDER"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error) or remote_code:
            raise
        message = (
            "open it in Python with trust_remote_code=True"
            if remote_code is None
            else "say base_remote_code: true in the recipe"
        )
        raise DavaeError(
            f"the base {name} brings Python code of its own, which is not executed. Read that code first; where you "
            f"trust it, {message}"
        ) from error


_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
