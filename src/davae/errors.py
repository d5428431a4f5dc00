"""Errors meant for the user."""


class DavaeError(ValueError):
    """An invalid request: the message says what is wrong, where, and how to fix it."""


def first_line(error: BaseException) -> str:
    """What an error says in its first line that is not empty; its class where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


class WarmStartError(DavaeError):
    """A transformer cannot be widened, or the widened one does not reproduce the original: names the layer."""
