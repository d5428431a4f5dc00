"""Opening base pipelines by name: embedded, random, from a folder, a finished run, or the hub."""

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline

from davae.bases.tiny import debug_base, load_tiny
from davae.errors import DavaeError
from davae.pipelines.saving.opening import open_pipeline, pipeline_place, published_files
from davae.recipes.presets import find_preset
from davae.recipes.settings import UpgradeRecipe


def built_in(name: str) -> DiffusionPipeline | None:
    """The embedded base (``tiny``) or a random one (``debug``, ``debug-sd3``); None for any other name."""
    if name in ("tiny", "debug"):
        return load_tiny() if name == "tiny" else debug_base()
    if not is_built_in(name):
        return None
    from davae.bases.debug_pipelines import small_pipeline

    return small_pipeline(name.removeprefix("debug-"))


def is_built_in(name: str) -> bool:
    """Whether a base comes with davae; of other names, a folder comes before a bundled configuration and the hub."""
    return name in ("tiny", "debug") or name.startswith("debug-")


def load_recipe_base(recipe: UpgradeRecipe, *, transformer_dtype: torch.dtype | None = None) -> DiffusionPipeline:
    """The base that a recipe names, at the revision that it pins."""
    return load_base(
        recipe.base,
        revision=recipe.base_revision,
        variant=recipe.base_variant,
        remote_code=recipe.base_remote_code,
        transformer_dtype=transformer_dtype,
    )


def load_base(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    remote_code: bool | None = None,
    transformer_dtype: torch.dtype | None = None,
    dtype: torch.dtype | Literal["saved"] | None = None,
) -> DiffusionPipeline:
    """Open a pipeline by name: embedded, built in code, from a folder, a finished run, or the hub.

    Args:
        name: ``tiny``, ``debug``, ``debug-sd3`` and similar, a folder, or a hub name.
        revision: of a hub name: branch, tag or commit; by default the newest.
        variant: of the weights' files, such as ``fp16`` in ``model.fp16.safetensors``; by default the files without
            one, or, if there are none, the only variant.
        remote_code: whether Python files beside the weights may be executed, from the recipe; ``None`` means no, for
            callers without a recipe.
        transformer_dtype: of the transformer alone; it is loaded in this type directly, since a large one would not
            fit twice.
        dtype: of all parts; ``saved`` is that of the saved transformer. By default float32, with text encoders
            as they were saved.

    Raises:
        DavaeError: there is none of that name; files are missing, damaged or incomplete; there are several variants
            and none was chosen; the base has code and ``remote_code`` is off; its weights are pickles; or a revision
            is given for a folder.
    """
    pipe = built_in(name)
    if pipe is not None:
        if transformer_dtype is not None:
            pipe.transformer.to(transformer_dtype)
        return pipe if dtype is None or dtype == "saved" else pipe.to(dtype)
    preset = find_preset(name)
    if preset is not None and preset.pipeline == "ClassConditionalPipeline":
        raise DavaeError(
            f"'{name}' is published as checkpoint files, not as a pipeline: convert them with `davae convert vavae` "
            "and `davae convert lightningdit --vae`, and give the folder; see docs/imagenet.md"
        )
    if preset is not None:
        name = preset.name  # on the hub
    options: dict[str, Any] = {"use_safetensors": True}
    if transformer_dtype is not None:
        options["dtype"] = {"transformer": transformer_dtype}
    if revision is not None:
        if Path(name).is_dir():
            raise DavaeError(f"base_revision is set, but {name} is a folder; revisions are of names on the hub")
        options["revision"] = revision
    if remote_code:
        options["trust_remote_code"] = True
    if variant is not None:
        options["variant"] = variant
    if dtype is not None:
        options["dtype"] = dtype
    path_or_repo = pipeline_place(name)
    try:
        return open_pipeline(path_or_repo, **options)
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
