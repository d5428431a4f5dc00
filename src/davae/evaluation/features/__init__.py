"""Feature networks: Inception, EfficientNet-Lite0, or any transformers model."""

from davae.evaluation.features.network import FeatureNetwork, Features
from davae.evaluation.features.open import open_network
from davae.evaluation.features.transformers_model import TextImageNetwork

__all__ = ["FeatureNetwork", "Features", "TextImageNetwork", "open_network"]
