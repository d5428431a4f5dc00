"""Errors that speak to the person who runs davae."""


class DavaeError(ValueError):
    """A mistake in what was asked: the message says what is wrong, where, and how to mend it."""


class WarmStartError(DavaeError):
    """A transformer cannot be widened, or the widened one does not start as the original: names the layer."""
