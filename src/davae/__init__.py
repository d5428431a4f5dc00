"""davae: larger images from the same number of tokens, for any latent diffusion model.

    import davae
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-3.5-medium")
    vae = davae.AutoencoderDA.from_base(pipe.vae, scale=2, detail_channels=16)
    pipe = davae.upgrade_pipeline(pipe, vae)

Importing davae is enough for diffusers to open pipelines that davae saved.
"""

from davae.errors import DavaeError
from davae.models import AutoencoderDA, LightningDiTTransformer2DModel
from davae.pipelines import ClassConditionalPipeline, upgrade_pipeline
from davae.version import __version__
from davae.warm_start import WarmStartError, widen_channels

__all__ = [
    "AutoencoderDA",
    "ClassConditionalPipeline",
    "DavaeError",
    "LightningDiTTransformer2DModel",
    "WarmStartError",
    "__version__",
    "upgrade_pipeline",
    "widen_channels",
]
