"""The error of the warm start."""

from davae.errors import DavaeError


class WarmStartError(DavaeError):
    """A transformer cannot be widened, or the widened one does not start as the original: names the layer."""
