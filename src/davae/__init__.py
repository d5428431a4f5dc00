"""davae: larger images from the same number of tokens, for any latent diffusion model."""

__version__ = "0.1.0"


class DavaeWarning(UserWarning):
    """Base of every warning that davae emits."""
