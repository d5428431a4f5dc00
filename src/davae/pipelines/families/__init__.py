"""Families of pipelines: how each encodes prompts, sees latents, calls its transformer and counts time."""

from davae.pipelines.families import (  # noqa: F401  each registers its family
    aura_flow,
    flux,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd3,
)
from davae.pipelines.families.classes import ClassFamily
from davae.pipelines.families.family import (
    Conditioning,
    PipelineFamily,
    encode_images,
    family_of,
    register_family,
    registered_pipelines,
    scheduler_shift,
)

__all__ = [
    "ClassFamily",
    "Conditioning",
    "PipelineFamily",
    "encode_images",
    "family_of",
    "register_family",
    "registered_pipelines",
    "scheduler_shift",
]
