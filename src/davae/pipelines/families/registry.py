"""Which family a pipeline belongs to."""

from __future__ import annotations

import difflib

from diffusers import DiffusionPipeline

from davae.errors import DavaeError
from davae.pipelines.families.family import PipelineFamily

_FAMILIES: dict[str, PipelineFamily] = {}


def register_family(family: PipelineFamily) -> PipelineFamily:
    """Make the pipelines of a family known; returns it.

    Raises:
        DavaeError: another family has one of the class names.
    """
    for name in family.pipelines:
        if _FAMILIES.setdefault(name, family) is not family:
            raise DavaeError(f"{name} belongs to the family of {_FAMILIES[name].name} already")
    return family


def registered_pipelines() -> list[str]:
    """Names of the pipeline classes that can be trained."""
    return sorted(_FAMILIES)


def family_of(pipe: DiffusionPipeline | type[DiffusionPipeline]) -> PipelineFamily:
    """The family of a pipeline (or of its class), by the names of its class and of those it derives from.

    Raises:
        DavaeError: no family knows it; names the nearest known class and how to add a family.
    """
    cls = pipe if isinstance(pipe, type) else type(pipe)
    for parent in cls.__mro__:
        if parent.__name__ in _FAMILIES:
            return _FAMILIES[parent.__name__]
    near = difflib.get_close_matches(cls.__name__, _FAMILIES, n=1)
    raise DavaeError(
        f"davae does not know how to train a {cls.__name__}{f' (did you mean {near[0]}?)' if near else ''}. Known "
        f"are {', '.join(registered_pipelines())}. Add it with davae.pipelines.families.register_family("
        "YourFamily()), a PipelineFamily that says how prompts are encoded and the transformer is called"
    )
