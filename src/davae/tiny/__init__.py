"""The embedded base pipeline: class-conditional, 64 x 64 images from 8 x 8 tokens, no download.

How it was made is told in the model card beside the weights (``pipeline/README.md``).
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from davae.errors import DavaeError
from davae.pipelines import ClassConditionalPipeline

TINY = Path(str(resources.files(__name__))) / "pipeline"


def load_tiny() -> ClassConditionalPipeline:
    """The embedded base: f8 autoencoder with 8 latent channels, LightningDiT transformer, 12 classes.

    Raises:
        DavaeError: the weights are missing from this installation.
    """
    if not (TINY / "model_index.json").is_file():
        raise DavaeError(f"the embedded base is missing from {TINY}; reinstall davae, or run `davae train base`")
    return ClassConditionalPipeline.from_pretrained(TINY)
