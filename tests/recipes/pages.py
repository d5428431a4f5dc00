"""Parts of documentation pages that are generated, between two marks."""

from pathlib import Path


def parts(page: Path, begin: str, end: str) -> tuple[str, str, str]:
    """The text before the marks, between them, and after them."""
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    inside, found, after = rest.partition(end)
    assert found, f"{page} has lost its marks {begin} and {end}"
    return before, inside, after


def replace(page: Path, begin: str, end: str, inside: str) -> None:
    """Write the page with other text between its marks."""
    before, _, after = parts(page, begin, end)
    page.write_text(f"{before}{begin}{inside}{end}{after}", encoding="utf-8")
