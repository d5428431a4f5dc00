"""The embedded base pipeline: class-conditional, 64 x 64 images from 8 x 8 tokens, no download.

Its model card (``pipeline/README.md``) says how it was made. Also here: a random base for the ``debug`` recipe and for
tests.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from davae.data.scenes import CLASSES
from davae.errors import DavaeError
from davae.models import LightningDiTTransformer2DModel
from davae.pipelines import ClassConditionalPipeline, load_pipeline

TINY = Path(__file__).parent / "pipeline"


def load_tiny() -> ClassConditionalPipeline:
    """The embedded base: f8 autoencoder with 8 latent channels, LightningDiT transformer, 12 classes.

    Raises:
        DavaeError: the weights are missing from this installation.
    """
    if not (TINY / "model_index.json").is_file():
        raise DavaeError(f"the embedded base is missing from {TINY}; reinstall davae, or run `davae train base`")
    return load_pipeline(TINY, dtype=torch.float32)


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
