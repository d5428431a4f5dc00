"""README, CONTRIBUTING and docs: what they name is there, commands are read, Python runs, the site is built.

A code block of Python runs, page by page in one namespace, unless ``<!-- not run: REASON -->`` stands above it. A
command of davae is read by the command line itself, with its recipe and overrides. Those of a block below
``<!-- run -->`` are run; of the others a mark ``<!-- not run: REASON -->``, or the page's ``<!-- commands of this page
are not run: REASON -->``, says why not: most take hours, and images that are not here.
"""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderDC, AutoencoderTiny, DiffusionPipeline, StableDiffusion3Pipeline
from PIL import Image
from typer.exceptions import TyperException
from typer.main import get_command

import davae
from davae.bases.debug_pipelines import small_pipeline
from davae.cli import main
from davae.cli.main import app
from davae.errors import DavaeError
from davae.recipes.read import load_ablation, load_recipe, recipe_names
from tests import links

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(
    r"(?<![\w./-])(?:src|tests|docs|configs)/[\w./-]+\.(?:py|yaml|yml|md|json|sbatch|sh|png|safetensors)\b"
)
NAME = re.compile(r"(?<![\w./@-])davae(?:\.[A-Za-z_]\w*)+(?![\w/-])")
RECIPE = re.compile(r"--recipe ([\w.-]+)(?=[\s`])")
VERB = re.compile(r"(?:^    |`)davae ([a-z][\w-]*)", re.M)
NO_NAMES = {
    *("davae.py", "davae.egg"),  # the file of code beside saved weights
    *("davae.families", "davae.adapters", "davae.sources"),  # groups of entry points
}
MADE_BY_HAND = {"my", "mine"}  # recipes of a reader's own


def _resolves(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for attribute in parts[end:]:
            if not hasattr(found, attribute):
                return attribute in getattr(found, "__annotations__", {})
            found = getattr(found, attribute)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path):
    text = page.read_text(encoding="utf-8")
    places = (ROOT, ROOT / "src" / "davae")  # configs/ is what `davae configs` writes
    missing = [file for file in set(FILE.findall(text)) if not any((place / file).exists() for place in places)]
    missing += [
        f"{file}::{test}"
        for file, test in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text)
        if f"def {test}(" not in (ROOT / file).read_text(encoding="utf-8")
    ]
    missing += [link for link in re.findall(r"\]\(([\w./-]+)[)#]", text) if not (page.parent / link).exists()]
    missing += [name for name in set(NAME.findall(text)) - NO_NAMES if not _resolves(name)]
    missing += [f"recipe {name}" for name in set(RECIPE.findall(text)) - MADE_BY_HAND if not _is_recipe(name)]
    verbs = {(c.name or c.callback.__name__) for c in app.registered_commands} | {g.name for g in app.registered_groups}
    missing += [f"verb {verb}" for verb in set(VERB.findall(text)) - verbs]
    assert not missing


def _is_recipe(name: str) -> bool:
    return name in recipe_names() or name.endswith((".yaml", ".yml")) or name.isupper()


class Block(NamedTuple):
    """A code block: its language (empty: commands, output or a tree), its text, and the comment above it."""

    line: int
    language: str
    text: str
    mark: str


FENCED = re.compile(r"^(?P<in> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=in)```$", re.M | re.S)
SHELL = re.compile(r"^(\$ |\.venv/bin/)?(davae|pip|python|make|nox|accelerate|torchrun|docker) ", re.M)
INDENTED = re.compile(r"(?<=\n\n)(?P<text>(?:(?: {4,}.*)?\n)+)")


def blocks(page: Path) -> Iterator[Block]:
    """The code blocks of a page, fenced and indented."""
    text = page.read_text(encoding="utf-8") + "\n"
    bare = FENCED.sub(lambda match: re.sub(r"[^\n]", "x", match[0]), text)
    found = [*FENCED.finditer(text), *INDENTED.finditer(bare)]
    for match in sorted(found, key=lambda match: match.start()):
        mark = re.search(r"<!-- ((?:not )?run.*?) -->\n+$", text[: match.start()])
        inside = re.sub(rf"^{match['in']}" if "in" in match.groupdict() else "^ {4}", "", match["text"], flags=re.M)
        language = match.groupdict().get("language", "")
        yield Block(text.count("\n", 0, match.start()) + 1, language, inside, mark[1] if mark else "")


def commands(block: Block) -> Iterator[list[str]]:
    """The arguments of each davae command, also behind a launcher; ``...`` stands for what was said before."""
    for line in block.text.replace("\\\n", " ").split("\n"):
        found = re.match(r"\s*(?:davae|(?:accelerate launch|torchrun|python) .*-m davae) (.*)", line)
        if found and "..." not in line:
            yield shlex.split(re.split(r"\s[>|&]+\s", found[1])[0], comments=True)


def problem(words: list[str]) -> str | None:
    """What the command line says against a command, short of what only its work would find."""
    command: Any = get_command(app)
    rest, said = list(words), "davae"
    while hasattr(command, "commands"):
        if rest and rest[0].startswith("-"):
            return None  # davae --help
        if not rest or rest[0] not in command.commands:
            return f"{said} has no {rest[:1]}"
        said, command = f"{said} {rest[0]}", command.commands[rest.pop(0)]
    context = command.context_class(command, info_name=said)
    try:
        given, more, _ = command.make_parser(context).parse_args(list(rest))
        for option in command.params:
            option.callback = None  # they look for folders and write nothing; this command is not kept
            if option.name in given:
                option.process_value(context, given[option.name])
            elif option.required:
                return f"{said}: {option.name} is missing"
        recipe = given.get("recipe")
        changes = [word for word in rest if re.match(r"[a-z][\w.]*=", word) and word[:1] != "-"]
        if isinstance(recipe, str) and recipe in recipe_names():
            load = load_ablation if said == "davae ablate" else load_recipe
            load(recipe, [c for c in changes if not re.search(r"\.[A-Z]+=|=[A-Z]+$", c)])
    except (DavaeError, TyperException) as error:
        return f"{said}: {error}"
    return f"{said} does not take {more}" if more else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_read(page: Path):
    wrong = [
        f"line {block.line}: {found}"
        for block in blocks(page)
        if block.language != "python"
        for words in commands(block)
        if (found := problem(words))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_is_run_or_says_why_not(page: Path):
    default = re.search(r"^<!-- commands of this page are not run: \w.* -->$", page.read_text(encoding="utf-8"), re.M)
    of_shells = [block for block in blocks(page) if block.language != "python" and SHELL.search(block.text)]
    assert [block.line for block in of_shells if not (default or re.fullmatch(r"run|not run: \w.*", block.mark))] == []
    assert default is None or any(block.mark != "run" for block in of_shells), "the page's mark has nothing to say"


def test_wrong_commands_are_found():
    for words in (
        ["trian"],
        ["train", "autoencodr"],
        ["demo", "--qick"],
        ["train", "autoencoder", "--recipe", "tiny", "data.pth=x"],
        ["generate"],
        ["bench", "training", "tiny", "--stage", "third"],
        ["doctor", "everything"],
    ):
        assert problem(words), words


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A folder with what the pages speak of, in small, and the names that their Python goes on from."""
    monkeypatch.chdir(tmp_path)
    for number in range(24):
        file = Path("photos", ("cat", "dog")[number % 2], f"{number}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((272, 300, 3), 10 * number, np.uint8)).save(file)
    base = small_pipeline("sd3")
    vae = davae.AutoencoderDA.from_base(base.vae, scale=2, detail_channels=base.vae.config.latent_channels)
    vae.save_pretrained("autoencoder")
    open_pipeline, call = DiffusionPipeline.from_pretrained.__func__, StableDiffusion3Pipeline.__call__
    monkeypatch.setattr(
        DiffusionPipeline,
        "from_pretrained",
        classmethod(
            lambda cls, name, **options: (
                small_pipeline("sd3") if name.startswith("stabilityai/") else open_pipeline(cls, name, **options)
            )
        ),
    )
    monkeypatch.setattr(
        StableDiffusion3Pipeline,
        "__call__",
        lambda *given, **asked: call(*given, **{**asked, "height": 64, "width": 64, "num_inference_steps": 2}),
    )
    tiny = AutoencoderTiny(
        latent_channels=base.vae.config.latent_channels,
        encoder_block_out_channels=(8,) * 2,
        decoder_block_out_channels=(8,) * 2,
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    monkeypatch.setattr(AutoencoderTiny, "from_pretrained", lambda name: tiny)
    monkeypatch.setattr(AutoencoderDC, "from_pretrained", lambda name: small_pipeline("sana").vae)
    upgraded = davae.upgrade_pipeline(base, vae)
    upgraded.save_pretrained("upgraded")
    return {
        "davae": davae,
        "torch": torch,
        "DiffusionPipeline": DiffusionPipeline,
        "pipe": base,
        "images": torch.rand(4, 3, 64, 64) * 2 - 1,
        "folder": "upgraded",
    }


PYTHON = [page for page in PAGES if any(block.language == "python" for block in blocks(page))]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_the_python_of_a_page_runs(page: Path, world: dict[str, Any]):
    if page.name == "saving.md":
        world["pipe"] = davae.load_pipeline("upgraded")
    for block in blocks(page):
        if block.language == "python":
            assert re.fullmatch(r"(not run: \w.*)?", block.mark), f"line {block.line}: say why it is not run"
            code = compile("\n" * block.line + block.text, page.name, "exec")
            if not block.mark.startswith("not run"):
                exec(code, world)


def test_python_is_fenced():
    wrong = [
        f"{page.name} line {block.line}"
        for page in PAGES
        for block in blocks(page)
        if not block.language and re.search(r"^(import|from) \w+|^\w+ = \w+\.\w+\(", block.text, re.M)
    ]
    assert not wrong


@pytest.mark.parametrize(
    "block",
    [pytest.param(b, id=f"{page.stem}-{b.line}") for page in PAGES for b in blocks(page) if b.mark == "run"],
)
def test_commands_that_say_so_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for words in commands(block):
        monkeypatch.setattr(sys, "argv", ["davae", *words])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert end.value.code == 0, words


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = PROJECT["urls"]["Repository"]


def test_the_citation_and_the_pythons_are_those_of_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == davae.__version__
    for paper in citation["references"]:
        assert all({"family-names", "given-names"} == author.keys() for author in paper["authors"]), paper["title"]
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    sessions = re.findall(r"python=(\[.*?\])", (ROOT / "noxfile.py").read_text(encoding="utf-8"))
    assert [yaml.safe_load(session) for session in sessions] == [pythons] * len(sessions)
    assert f"Python {pythons[0]} to {pythons[-1]}" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_description_on_an_index_page_has_no_relative_link():
    spec = importlib.util.spec_from_file_location("davae_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    links = re.findall(r"!?\[[^]]*\]\(([^)]*)\)", setup.description())
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert f"{ADDRESS}/raw/main/docs/images/lettering.jpg" in links
    assert f"{ADDRESS}/blob/main/docs/data.md" in links


def test_the_address_has_one_home():
    """And ComfyUI's registry wants it once more."""
    homes = ["pyproject.toml", "src/davae/comfyui/custom_node/pyproject.toml"]
    assert [(str(file), link) for file, link in links.links() if link.startswith(ADDRESS)] == [
        (home, ADDRESS) for home in homes
    ]
    for file in (*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py"), ROOT / "Makefile"):
        assert ADDRESS not in file.read_text(encoding="utf-8"), file


def test_links_that_leave_the_repository_are_of_known_kinds():
    found = list(links.links())
    assert {file.parts[0] for file, _ in found} >= {"README.md", "docs", "src", "pyproject.toml"}
    assert [f"{file}: {link}: {wrong}" for file, link in found if (wrong := links.problem(link))] == []
    cited = re.findall(r"arXiv:([\d.]+)", (ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {link.rpartition("/")[2] for _, link in found if "arxiv.org" in link} <= set(cited)
    for wrong in (
        "http://arxiv.org/abs/2410.10733", "https://arxiv.org/abs/24101.0733", "https://example.org/x",
        "https://huggingface.co/one", "https://github.com/owner", "https://arxiv.org.example.org/abs/2410.10733",
    ):  # fmt: skip
        assert links.problem(wrong), wrong


def test_what_is_gone_is_told_from_what_cannot_be_reached():
    class Server(BaseHTTPRequestHandler):
        def do_HEAD(self):
            known = {"/there": 200, "/moved": 301, "/old": 404, "/never-head": 405, "/closed": 401, "/ill": 503}
            self.send_response(known[self.path])
            self.send_header("Location", "/there")
            self.end_headers()

        def do_GET(self):
            self.send_response(200 if self.path in ("/never-head", "/there") else 500)
            self.end_headers()

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        answers = {
            path: links.ask(here + path, 5) for path in ("/there", "/moved", "/old", "/never-head", "/closed", "/ill")
        }
        server.shutdown()
    states = {path: answer.state for path, answer in answers.items()}
    assert states == {
        **dict.fromkeys(("/there", "/moved", "/never-head"), "there"),
        **dict.fromkeys(("/closed", "/ill"), "unknown"),
        "/old": "gone",
    }
    assert answers["/moved"].why == f"200, at {here}/there"
    assert links.ask(here + "/there", 5).why.startswith("no connection: ")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation as a site, built strictly: a broken link, an anchor that is not there, a page left out fail."""
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip("MkDocs is not installed: pip install 'davae[docs]'")
    out = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "WARNING" not in made.stdout + made.stderr
    return out


def test_the_site_has_every_page_and_name(site: Path):
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    reference = (site / "reference.html").read_text(encoding="utf-8")
    for name in set(davae.__all__) - {"__version__"}:
        assert re.search(rf'id="davae\.\w+\.{name}"', reference), name
    assert not re.search(r":(class|func|mod|meth):", reference)
    assert "Two commands" in (site / "index.html").read_text(encoding="utf-8")


def test_the_site_loads_nothing_from_elsewhere(site: Path):
    """Neither fonts nor scripts, pictures or styles; links are for the reader to follow. Its search needs no server."""
    loads = re.compile(r"<(?:script|img|iframe|source)[^>]+src=\"?(https?:)?//|<link[^>]+href=\"?(https?:)?//")
    styles = re.compile(r"(?:@import\s+|url\()[\"']?(?:https?:)?//")
    for file in site.rglob("*"):
        if file.suffix == ".html":
            assert not loads.search(file.read_text(encoding="utf-8")), file
        elif file.suffix == ".css":
            assert not styles.search(file.read_text(encoding="utf-8")), file
    assert (site / "search" / "search_index.js").is_file()
    assert 'src="assets/iframe-worker.js"' in (site / "index.html").read_text(encoding="utf-8")


def test_settings_that_the_comforts_name_are_taken():
    """Those in one code span together; every row has a command."""
    text = (ROOT / "docs" / "comforts.md").read_text(encoding="utf-8")
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 25
    assert {len(row) for row in rows} == {9}
    assert [row[0] for row in rows if "`" not in row[8] and "same command" not in row[8]] == []
    spans = [shlex.split(span) for span in re.findall(r"`([\w.]+=[^`]+)`", text)]
    assert len(spans) > 15
    for overrides in spans:
        load_recipe("debug-text", overrides)
