"""Pipelines: the class-conditional one, and upgrading, sampling, saving and loading of any."""

from davae.pipelines.class_conditional import ClassConditionalPipeline
from davae.pipelines.families import fit_to_autoencoder
from davae.pipelines.lora import attach_lora, attached_lora, merge_lora
from davae.pipelines.sampling.previews import Previews, set_preview_decoder
from davae.pipelines.sampling.speed import speed_up
from davae.pipelines.saving.adapters import load_adapters, save_adapters
from davae.pipelines.saving.licence import Licence, find_licence
from davae.pipelines.saving.model_card import Making, write_model_card
from davae.pipelines.saving.opening import load_pipeline
from davae.pipelines.saving.saving import push_to_hub, save_pipeline
from davae.pipelines.upgrade import upgrade_pipeline

__all__ = [
    "ClassConditionalPipeline",
    "Licence",
    "Making",
    "Previews",
    "attach_lora",
    "attached_lora",
    "find_licence",
    "fit_to_autoencoder",
    "load_adapters",
    "load_pipeline",
    "merge_lora",
    "push_to_hub",
    "save_adapters",
    "save_pipeline",
    "set_preview_decoder",
    "speed_up",
    "upgrade_pipeline",
    "write_model_card",
]
