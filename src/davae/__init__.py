"""davae: larger images from the same number of tokens, for any latent diffusion model.

    import davae
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
    vae = davae.AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=16)
    pipe = davae.upgrade_pipeline(pipe, vae)

Importing davae is enough for diffusers to open pipelines that davae saved.
"""

import sys

import diffusers

from davae.errors import DavaeError, WarmStartError
from davae.models import AutoencoderDA, LightningDiTTransformer2DModel
from davae.pipelines import (
    ClassConditionalPipeline,
    load_adapters,
    load_pipeline,
    push_to_hub,
    save_adapters,
    save_pipeline,
    speed_up,
    upgrade_pipeline,
    write_model_card,
)
from davae.version import __version__
from davae.warm_start import widen_channels

__all__ = [
    "AutoencoderDA",
    "ClassConditionalPipeline",
    "DavaeError",
    "LightningDiTTransformer2DModel",
    "WarmStartError",
    "__version__",
    "load_adapters",
    "load_pipeline",
    "push_to_hub",
    "save_adapters",
    "save_pipeline",
    "speed_up",
    "upgrade_pipeline",
    "widen_channels",
    "write_model_card",
]

# diffusers looks for the class of a pipeline, and for the library of a component that is not its own, among its own
# names. It offers no other way that runs davae's classes and not the code in a folder.
diffusers.ClassConditionalPipeline = ClassConditionalPipeline
diffusers.pipelines.davae = sys.modules[__name__]
