"""Networks as diffusers models: the detail-aligned autoencoder, its blocks and adapters, the transformer."""

from davae.models.autoencoder.autoencoder_da import AutoencoderDA, Level, detail_dropout_factor
from davae.models.autoencoder.fitted_start import fit_start
from davae.models.autoencoder.posterior import StructuredPosterior
from davae.models.autoencoder.residual_sampling import ResidualDownsample, ResidualUpsample
from davae.models.base_adapters.adapter import BaseAdapter, Convolution, FeatureChain, find_adapter, register_adapter
from davae.models.base_adapters.nested import NestedAdapter
from davae.models.discriminator import PatchDiscriminator, hinge_discriminator_loss, hinge_generator_loss
from davae.models.lightningdit import LightningDiTTransformer2DModel

__all__ = [
    "AutoencoderDA",
    "BaseAdapter",
    "Convolution",
    "FeatureChain",
    "Level",
    "LightningDiTTransformer2DModel",
    "NestedAdapter",
    "PatchDiscriminator",
    "ResidualDownsample",
    "ResidualUpsample",
    "StructuredPosterior",
    "detail_dropout_factor",
    "find_adapter",
    "fit_start",
    "hinge_discriminator_loss",
    "hinge_generator_loss",
    "register_adapter",
]
