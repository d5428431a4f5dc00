"""Terminal output. Text from outside (names of files, classes, variants) is shown and never interpreted.

This module imports rich; code that must start quickly imports it inside functions.
"""

import logging
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.text import Text

T = TypeVar("T")

# Control characters except tab and newline, line and paragraph separators, bidirectional controls, lone surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Escape control characters (``\\x1b`` for ESC), so that a terminal only displays the text."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def shown(name: object) -> str:
    """A name from outside on one line: :func:`printable`, with newlines and tabs escaped too."""
    return printable(str(name)).replace("\n", "\\n").replace("\t", "\\t")


class PlainConsole(Console):
    """A console that prints ``[red]`` and ``:smile:`` literally, also in tables."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """The text, without markup or emoji codes interpreted."""
        return super().render_str(printable(text), **options)


def wide_console() -> PlainConsole:
    """A console for wide tables: at least 140 columns where the output is not a terminal."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=max(140, console.width))


def say(*texts: object) -> None:
    """Print texts to standard output, one per line; newlines in a path are escaped. Nothing if it is closed."""
    for text in texts:
        if sys.stdout is not None:
            sys.stdout.write((shown(text) if isinstance(text, Path) else printable(str(text))) + "\n")


def track(values: Iterable[T], name: str, *, total: int, disable: bool = False) -> Iterable[T]:
    """Iterate over values with a progress bar that disappears at the end, where standard error is a terminal."""
    console = PlainConsole(stderr=True)
    label = escape(shown(name))
    disable = disable or not console.is_terminal
    return progress.track(values, label, total=total, transient=True, disable=disable, console=console)


def tell(text: str, *, style: str = "") -> None:
    """Print a message to standard error without wrapping it, so that commands in it can be copied."""
    PlainConsole(stderr=True).print(f"davae: {indented(text)}", style=style, soft_wrap=True)


def indented(text: str) -> str:
    """Indent all lines but the first, so that none of them looks like a message of its own."""
    return text.replace("\n", "\n  ")


class ToldOnce(logging.Filter):
    """Drops davae's messages that were shown already: several stages of one command open the same images."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to show a record."""
        text = record.getMessage()
        if not record.name.startswith("davae") or record.levelno >= logging.ERROR or text not in self._told:
            self._told.add(text)
            return True
        return False


class PlainFormatter(logging.Formatter):
    """Log messages made :func:`printable` and :func:`indented`; tracebacks are unchanged."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The formatted line of a record."""
        record.message = indented(printable(record.message))
        return super().formatMessage(record)
