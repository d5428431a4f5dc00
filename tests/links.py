"""The links that leave this repository: which there are, and whether they lead anywhere (`make links`, on purpose).

What is asked of the network is one answer for each address. An address that is gone is told from one about which
nothing can be said from here: no name, no connection, an answer for people who are logged in, a server in trouble.
"""

from __future__ import annotations

import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
FILES = ("*.md", "*.toml", "*.cff", "*.yml", "docs/**/*.md", "notebooks/*.ipynb", "src/**/*.*")
LINK = re.compile(r"https?://[^\s<>()\[\]\"'`\\]+")
NAMES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # of XML; nobody follows them
OWN = re.compile(r"http://(127\.0\.0\.1:|\{)")  # the studio's page; in code its address is put in
KINDS = {  # what the pages may rely on: papers, code and models at their origin, licences, a dependency's pages
    "arxiv.org": r"/abs/\d{4}\.\d{5}",
    "creativecommons.org": r"/licenses/[a-z-]+/\d\.\d/",
    "download.pytorch.org": r"/(whl/\w+|models/[\w.-]+\.pth)",
    "github.com": r"/[\w-]+/[\w.-]+(/issues/\d+|/blob/main/[\w./-]+|/releases/download/[\w./{}-]+)?",
    "huggingface.co": r"/(docs/\w+|(?!docs/)([\w-]+/[\w.-]+|\{\w+\})(/blob/main/([\w.-]+|\{\w+\}))?)",
    "stability.ai": r"/community-license-agreement",
    "www.apache.org": r"/licenses/LICENSE-2\.0",
}
SECONDS = 20.0
State = Literal["there", "gone", "unknown"]


class Answer(NamedTuple):
    """What became of an address, and why."""

    state: State
    why: str


def links() -> Iterator[tuple[Path, str]]:
    """Each file's addresses, with ``{...}`` where the code puts in a name."""
    for file in sorted({file for pattern in FILES for file in ROOT.glob(pattern)}):
        if file.suffix in {
            ".md",
            ".toml",
            ".cff",
            ".yml",
            ".yaml",
            ".ipynb",
            ".json",
            ".py",
            ".html",
            ".css",
            ".sbatch",
        }:
            for address in dict.fromkeys(LINK.findall(file.read_text(encoding="utf-8"))):
                if address not in NAMES and not OWN.match(address):
                    yield file.relative_to(ROOT), address.rstrip(".,;:")


def problem(address: str) -> str | None:
    """What is wrong with an address, without asking anybody."""
    if not address.startswith("https://"):
        return "not https"
    host, slash, path = address.removeprefix("https://").partition("/")
    if host not in KINDS:
        return f"{host} is no host that the pages rely on ({', '.join(KINDS)})"
    if not re.fullmatch(KINDS[host], slash + path.partition("#")[0]):
        return f"nothing that is known at {host}"
    return None


def ask(address: str, seconds: float = SECONDS) -> Answer:
    """Ask for an address, without its contents where the server allows it."""
    for method in ("HEAD", "GET"):
        request = urllib.request.Request(address, method=method, headers={"User-Agent": "davae-links"})
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                moved = "" if response.url == address else f", at {response.url}"
                return Answer("there", f"{response.status}{moved}")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 410):
                return Answer("gone", str(error.code))
            if error.code not in (400, 403, 405, 501) or method == "GET":
                return Answer("unknown", f"the server answers {error.code}")
        except (OSError, ValueError) as error:
            return Answer("unknown", f"no connection: {getattr(error, 'reason', None) or error}")
    raise AssertionError("a GET has an answer")


def main() -> int:
    """Ask for all of them; 1 if one is gone, 2 if nothing is known of one, else 0."""
    places: dict[str, list[str]] = {}
    for file, address in links():
        if "{" not in address:
            places.setdefault(address, []).append(str(file))
    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(places, pool.map(ask, places)))
    for state in ("there", "unknown", "gone"):
        for address, answer in answers.items():
            if answer.state == state:
                print(f"{state:8}{address}  ({answer.why})  in {', '.join(places[address])}")
    count = {state: sum(answer.state == state for answer in answers.values()) for state in ("there", "unknown", "gone")}
    print(f"{len(answers)} addresses: {count['there']} there, {count['gone']} gone, {count['unknown']} unknown")
    return 1 if count["gone"] else 2 if count["unknown"] else 0


if __name__ == "__main__":
    sys.exit(main())
