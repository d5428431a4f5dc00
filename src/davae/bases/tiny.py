"""The embedded pipelines: class-conditional, 64 x 64 images from 8 x 8 tokens, upgraded 128 x 128; no download.

Their model cards, in the folder ``shipped``, say how they were made. Also here: a random base for the ``debug`` recipe
and for tests.
"""

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from davae.data.scenes import CLASSES
from davae.errors import DavaeError
from davae.models import LightningDiTTransformer2DModel
from davae.pipelines import ClassConditionalPipeline, load_pipeline
from davae.runtime.package_files import TINY, shipped


def load_tiny(name: str = TINY) -> ClassConditionalPipeline:
    """The embedded base, an f8 autoencoder and a LightningDiT transformer for 12 classes, or its upgrade.

    Raises:
        DavaeError: the weights are missing from this installation.
    """
    folder = shipped(name)
    if folder is None:
        raise DavaeError(f"the weights of '{name}' are missing from this installation; reinstall davae")
    return load_pipeline(folder, dtype=torch.float32)


def debug_base(seed: int = 0) -> ClassConditionalPipeline:
    """A pipeline with random weights: f4 autoencoder with 4 latent channels, 16 x 16 images, the same classes.

    Args:
        seed: of the weights; torch's own random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=1.5,
            shift_factor=0.1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=False,
        )
        transformer = LightningDiTTransformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_classes=len(CLASSES),
            qk_norm=True,
        )
        for parameter in transformer.parameters():  # a zero head would make the base predict nothing
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return ClassConditionalPipeline(
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        id2label=dict(enumerate(CLASSES)),
    )
