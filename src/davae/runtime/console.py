"""What people read in a terminal: text from outside (names of files, classes, variants) is shown, never obeyed.

It imports rich: code that answers quickly imports it inside its functions.
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

# Control characters but for tab and newline, line and paragraph separators, controls of direction, lone surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text whose control characters are spelled out, ``\\x1b`` for ESC: a terminal does nothing but show it."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text)


def shown(name: object) -> str:
    """A name from outside on one line: :func:`printable`, newlines and tabs spelled out too."""
    return printable(str(name)).replace("\n", "\\n").replace("\t", "\\t")


class PlainConsole(Console):
    """A console that takes ``[red]`` and ``:smile:`` in a name for what they are, in tables too."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, "highlight": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        """Text as it stands."""
        return super().render_str(printable(text), **options)


def wide_console() -> PlainConsole:
    """A console for tables of many columns; where it is no terminal, a file has room for all of them."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=max(140, console.width))


def say(*texts: object) -> None:
    """Texts on standard output, each with a newline; a path on one line whatever it is called."""
    for text in texts:
        sys.stdout.write((shown(text) if isinstance(text, Path) else printable(str(text))) + "\n")


def track(values: Iterable[T], name: str, *, total: int, disable: bool = False) -> Iterable[T]:
    """The values one by one, under a bar that goes away at the end."""
    label = escape(shown(name))
    return progress.track(values, label, total=total, transient=True, disable=disable, console=PlainConsole())


def tell(text: str, *, style: str = "") -> None:
    """A line on standard error, never broken to the terminal's width: a command in it is there to be copied."""
    PlainConsole(stderr=True).print(f"davae: {indented(text)}", style=style, soft_wrap=True)


def indented(text: str) -> str:
    """Text whose further lines stand in a little, so that none of them passes for a message of its own."""
    return text.replace("\n", "\n  ")


class PlainFormatter(logging.Formatter):
    """Log messages as :func:`printable` text, further lines :func:`indented`; tracebacks stay as they are."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        record.message = indented(printable(record.message))
        return super().formatMessage(record)
