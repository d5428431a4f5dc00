"""The description on a package index: README.md with absolute links. Everything else is in pyproject.toml."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent


def description() -> str:
    """README.md, with its relative links and pictures below the repository's address."""
    address = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    text = (HERE / "README.md").read_text(encoding="utf-8")
    pictures = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{address}/raw/main/", text)
    return re.sub(r"(\]\()(?!https?:|#)", rf"\1{address}/blob/main/", pictures)


if __name__ == "__main__":  # not where a test imports this file
    setup(long_description=description(), long_description_content_type="text/markdown")
