"""Errors that speak to the person who runs davae."""


class DavaeError(ValueError):
    """A mistake in what was asked: the message says what is wrong, where, and how to mend it."""
