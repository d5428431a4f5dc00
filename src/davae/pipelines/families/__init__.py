"""Families of pipelines: how each encodes prompts, scales latents, calls its transformer and scales time."""

from davae.pipelines.families import (  # noqa: F401  (each registers its families)
    aura_flow,
    flux,
    ideogram4,
    lumina2,
    pixart,
    qwen_image,
    sana,
    sd3,
    upgrade_only,
    z_image,
)
from davae.pipelines.families.classes import ClassFamily
from davae.pipelines.families.family import (
    PROMPTS_TOGETHER,
    Conditioning,
    PipelineFamily,
    UpgradeOnlyFamily,
    family_of,
    find_family,
    fit_to_autoencoder,
    register_family,
    registered_pipelines,
    scheduler_shift,
    why_untrainable,
)

__all__ = [
    "PROMPTS_TOGETHER",
    "ClassFamily",
    "Conditioning",
    "PipelineFamily",
    "UpgradeOnlyFamily",
    "family_of",
    "find_family",
    "fit_to_autoencoder",
    "register_family",
    "registered_pipelines",
    "scheduler_shift",
    "why_untrainable",
]
