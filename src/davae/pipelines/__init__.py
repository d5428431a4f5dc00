"""Pipelines: the class-conditional one, and the upgrade of any."""

from davae.pipelines.class_conditional import ClassConditionalPipeline
from davae.pipelines.scaling import latent_scaling
from davae.pipelines.upgrade import upgrade_pipeline

__all__ = ["ClassConditionalPipeline", "latent_scaling", "upgrade_pipeline"]
