"""What MkDocs needs to be told about these pages; on a code host they read as they are.

README.md is the first page. Links to files that are no page lead to the repository, whose address is in pyproject.toml.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
ADDRESS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
LINK = re.compile(r"(\]\()([^):#\s]+)(#[^)]*)?\)")
LIST_ITEM = re.compile(r"[-*] |\d\. ")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>~?(?:davae\.)?([^<]+)</code>")


def on_config(config: Any) -> None:
    """Search in pages opened as files is a script of this folder, not of a host (the offline plugin's default)."""
    config.extra["polyfills"] = [file for file in config.extra["polyfills"] if ":" not in file]


def on_files(files: Files, *, config: Any) -> Files:
    """Add README.md as the first page."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=_with_links(text, ROOT)))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Make links lead somewhere, and lists Python-Markdown's."""
    if page.file.src_uri != "index.md":
        markdown = _with_links(markdown, DOCS)
    return _with_deep_lists(markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Show the names in docstrings without their Sphinx roles."""
    return ROLE.sub(r"<code>\1</code>", html)


def _with_links(text: str, folder: Path) -> str:
    """Links relative to a folder of the repository, as links relative to ``docs``, or to the repository."""

    def one(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if target == ROOT / "README.md":
            where = "index.md"
        elif target.is_file() and target.is_relative_to(DOCS):
            where = target.relative_to(DOCS).as_posix()
        else:
            where = f"{ADDRESS}/{'tree' if target.is_dir() else 'blob'}/main/{target.relative_to(ROOT).as_posix()}"
        return f"{match[1]}{where}{match[3] or ''})"

    return LINK.sub(one, text)


def _with_deep_lists(text: str) -> str:
    """What belongs to a list item begins four columns in, not two or three as elsewhere."""
    lines, inside = [], 0
    for line in text.split("\n"):
        if item := LIST_ITEM.match(line):
            inside = 4 - len(item[0])
        elif line and not line.startswith("  "):
            inside = 0
        lines.append(" " * inside + line if inside and line and not item else line)
    return "\n".join(lines)
