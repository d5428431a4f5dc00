"""Names from outside reach people as text: no markup, no escape sequence, no line of their own."""

import ast
import io
import logging
import sys
from pathlib import Path

import pytest
from rich.table import Table
from typer.testing import CliRunner

import davae
from davae.cli.main import app
from davae.data.sources.bad_files import describe
from davae.runtime.console import PlainConsole, PlainFormatter, ToldOnce, printable, say, shown, tell, track

SOURCE = Path(davae.__file__).parent
NASTY = "a[/x]:smile:\x1b[31m\x9b2J\u202eb\ud800\rdavae: all is well"
SEEN = "a[/x]:smile:\\x1b[31m\\x9b2J\\u202eb\\ud800\\rdavae: all is well"


def test_control_characters_are_spelled_out_and_text_is_left_alone() -> None:
    assert printable(NASTY) == SEEN
    for text in ("größe ä 图像 👩‍👩‍👧\tx\ny", "C:\\new", "[bold]"):
        assert printable(text) == text
    assert shown(Path("a\nb\tc")) == "a\\nb\\tc"


def test_a_table_shows_names_as_they_are() -> None:
    file = io.StringIO()
    console = PlainConsole(file=file, width=160)
    table = Table("autoencoder", NASTY, title=NASTY)
    table.add_row(NASTY, "1.0")
    console.print(table)
    console.print(NASTY)
    assert file.getvalue().count(SEEN) == 4
    assert "\x1b" not in file.getvalue()


def test_messages_results_and_bars(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tell(f"no file {NASTY}\ndavae: forged")
    assert capsys.readouterr().err == f"davae: no file {SEEN}\n  davae: forged\n"
    say(Path(f"{NASTY}\nforged"))
    say("two\nlines")
    assert capsys.readouterr().out == f"{SEEN}\\nforged\ntwo\nlines\n"
    assert list(track([1, 2], "[/x]\x1b", total=2)) == [1, 2]
    assert capsys.readouterr() == ("", "")  # no terminal
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert list(track([1, 2], "[/x]\x1b", total=2)) == [1, 2]
    bar = capsys.readouterr()
    assert bar.out == ""  # results alone go there
    assert "[/x]" in bar.err
    assert "\x1b[/x]" not in bar.err


def test_a_closed_output_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``davae doctor >&-``, where Python has no ``sys.stdout``."""
    monkeypatch.setattr(sys, "stdout", None)
    say("a")
    PlainConsole().print(Table("a"))


def test_a_log_line_is_no_other_line() -> None:
    record = logging.LogRecord("davae", logging.WARNING, "", 0, "%s: cut", (f"{NASTY}\n12:00:00 step 9",), None)
    assert PlainFormatter("%(message)s").format(record) == f"{SEEN}\n  12:00:00 step 9: cut"


def test_what_a_command_told_it_does_not_tell_again() -> None:
    once = ToldOnce()

    def shows(name: str, level: int, text: str, *values: object) -> bool:
        return once.filter(logging.LogRecord(name, level, "", 0, text, values, None))

    assert shows("davae.data.open", logging.INFO, "%s: %d images", "photos", 60)
    assert not shows("davae.data.open", logging.INFO, "photos: 60 images")
    assert shows("davae.data.open", logging.INFO, "%s: %d images", "photos", 61)
    assert [shows("davae.x", logging.ERROR, "failed") for _ in range(2)] == [True, True]
    assert [shows("elsewhere", logging.INFO, "said") for _ in range(2)] == [True, True]


def test_a_skipped_file_has_one_line() -> None:
    assert describe([("x\n  good.png: fine", "damaged")]) == "1 file was skipped:\n  x\\n  good.png: fine: damaged"


def test_the_command_line_says_it_so() -> None:
    done = CliRunner().invoke(app, ["plan", "--base", "no/such[/x]\x1b[2J"])
    assert done.exit_code
    assert "\x1b[2J" not in done.output


def test_nothing_writes_to_a_terminal_in_another_way() -> None:
    """Rich's own console and bar read markup, and ``print`` and ``typer.echo`` obey whatever a name holds."""
    found = []
    for file in SOURCE.rglob("*.py"):
        if file.name == "console.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("rich"):
                found += [f"{file.name}:{node.lineno}" for a in node.names if a.name in {"Console", "track"}]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "typer.echo", "typer.secho"):
                found.append(f"{file.name}:{node.lineno} {ast.unparse(node)}")
    assert [line for line in found if "typer.echo(f'davae {__version__}')" not in line] == []
