"""Errors meant for the user."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class DavaeError(ValueError):
    """An invalid request: the message says what is wrong, where, and how to fix it."""


@contextmanager
def named(setting: str) -> Iterator[None]:
    """Put the setting that led to it before an error of the block."""
    try:
        yield
    except DavaeError as error:
        raise DavaeError(f"{setting}: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error says in its first line that is not empty; its class where it says nothing."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def first_names(names: Sequence[str], most: int) -> str:
    """The first names of many, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class WarmStartError(DavaeError):
    """A transformer cannot be widened, or the widened one does not reproduce the original: names the layer."""
