"""The studio's page in a real browser, at the widths of a phone and of a desk; skipped where there is none.

It takes Gradio (``pip install 'davae[studio]'``), Playwright's Python package, and Chromium: ``DAVAE_CHROMIUM``, else
the ``chromium`` of the search path.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import torch
from PIL import Image

gradio = pytest.importorskip("gradio", reason="gradio is not installed: pip install 'davae[studio]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed, which drives the browser")
CHROMIUM = os.environ.get("DAVAE_CHROMIUM") or shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("there is no chromium: DAVAE_CHROMIUM names it", allow_module_level=True)

from davae.studio import open_models  # noqa: E402
from davae.studio.page import _listening, studio_app  # noqa: E402

PATIENCE = 60_000  # milliseconds


def write_metrics(run: Path, steps: int) -> None:
    lines = [json.dumps({"step": step, "total": 1 / step, "<b>": 2 / step}) for step in range(1, steps + 1)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run = root / "photos"
    (run / "samples").mkdir(parents=True)
    (run / "config.yaml").write_text("autoencoder: {loop: {steps: 90}}\n")
    write_metrics(run, 30)
    Image.new("RGB", (60, 20), "green").save(run / "samples" / "step-30.png")
    return root


@pytest.fixture(scope="module")
def address(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a page over the small random base."""
    import uvicorn

    models = open_models("debug", runs)
    with _listening(0) as listener:
        app = studio_app(models, runs, tmp_path_factory.mktemp("page"))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


class Visit:
    """A page that is open, every request that it made, and every error of its console."""

    def __init__(self, browser: Any, address: str, width: int) -> None:
        self.page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.set_default_timeout(PATIENCE)
        self.page.goto(address)
        self.button("Reconstruct").wait_for()

    def button(self, name: str) -> Any:
        return self.page.get_by_role("button", name=name, exact=True)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def row(self, name: str) -> Any:
        """Cells of a row of the visible table."""
        row = self.page.locator("tr:visible", has=self.page.get_by_role("rowheader", name=name, exact=True))
        return row.get_by_role("cell")

    def slider(self) -> list[list[int]]:
        """Sizes of the pictures below the visible slider."""
        pictures = self.page.locator(".studio-pixels:visible img")
        pictures.nth(1).wait_for()
        return pictures.evaluate_all("all => all.map(one => [one.naturalWidth, one.naturalHeight])")

    def scrolls_sideways(self) -> bool:
        return self.page.evaluate("document.documentElement.scrollWidth > innerWidth")


@pytest.fixture(params=[360, 1280])
def visit(request: pytest.FixtureRequest, browser: Any, address: str) -> Iterator[Visit]:
    """At the width of a phone and of a desk; nothing of it may go elsewhere, fail, or be wider than the screen."""
    found = Visit(browser, address, request.param)
    yield found
    assert not found.scrolls_sideways()
    assert {urlsplit(url).hostname for url in found.requests if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
    assert found.errors == []
    found.page.context.close()


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = torch.rand(3, 40, 52, generator=torch.Generator().manual_seed(1))
    Image.fromarray((noise * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def test_a_picture_is_reconstructed_and_compared(visit: Visit, picture: Path) -> None:
    visit.page.set_input_files("input[type=file]", picture)
    cells = visit.row("With details")
    cells.first.wait_for()
    decibel, positions = cells.all_text_contents()
    assert 0 < float(decibel) < 60
    assert positions == "12"  # 32 x 24 pixels
    assert visit.slider()
    visit.page.get_by_label("4 ×").check()
    visit.page.get_by_label("Right").click()
    visit.page.get_by_role("option", name="Original").click()
    assert visit.slider()


def test_what_is_no_picture_is_told(visit: Visit, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    visit.page.set_input_files("input[type=file]", tmp_path / "text.png")
    visit.page.get_by_text("not an image in a known format").wait_for()
    assert "Traceback" not in visit.page.content()


def test_base_and_upgrade_are_sampled_side_by_side_and_stop(visit: Visit) -> None:
    visit.tab("Generate")
    visit.page.get_by_label("Also the base at full size").check()
    visit.button("Generate").click()
    visit.page.get_by_role("cell", name="50 of 50").nth(2).wait_for()
    visit.row("Pixels").nth(2).get_by_text("32 × 32").wait_for()
    assert visit.row("Image tokens").all_text_contents() == ["16", "16", "64"]
    assert visit.slider()
    assert visit.page.locator(".studio-preview img").evaluate("one => one.naturalWidth") == 16
    visit.page.get_by_label("number input for Steps").fill("100")
    visit.page.keyboard.press("Tab")
    visit.button("Generate").click()
    visit.page.get_by_role("cell", name=re.compile(r"^\d+ of 100$")).first.wait_for()
    visit.button("Stop").click()
    visit.page.get_by_text("Stopped.").wait_for()


def test_the_form_plans_and_names_mistakes(visit: Visit) -> None:
    visit.tab("Plan")
    visit.page.get_by_label("Resolution").fill("100")
    visit.button("Plan").click()
    visit.page.get_by_text("resolution 100 does not fit").wait_for()
    visit.page.get_by_label("Resolution").fill("1024")
    visit.button("Plan").click()
    cells = visit.row("image tokens")
    cells.first.wait_for()
    assert cells.all_text_contents() == ["1024", "4096", "1024"]
    visit.page.get_by_text("davae plan sd35-medium --resolution 1024").wait_for()


def test_a_run_is_watched_while_it_goes_on(visit: Visit, runs: Path) -> None:
    write_metrics(runs / "photos", 30)
    visit.tab("Run")
    visit.page.get_by_text("Step 30 of 90").wait_for()
    visit.page.get_by_text("<b>").first.wait_for()  # a name as text, not as markup
    visit.page.locator(".studio-curve svg").wait_for()
    visit.page.get_by_role("radio", name="30", exact=True).wait_for()
    write_metrics(runs / "photos", 31)
    visit.page.get_by_text("Step 31 of 90").wait_for()
    visit.page.get_by_label("Run below").fill("../elsewhere")
    visit.page.get_by_label("Run below").press("Enter")
    visit.page.get_by_text("does not lie below").first.wait_for()


def status(address: str, path: str, **options: Any) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(address + path, **options)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_no_file_is_served_and_no_other_page_answered(address: str, runs: Path) -> None:
    assert status(address, "/") == 200
    for file in ("/etc/hostname", str(runs / "photos" / "config.yaml"), str(Path(__file__)), "pyproject.toml"):
        assert status(address, f"/gradio_api/file={file}") in (403, 404)
    assert status(address, "/", headers={"Host": "evil.example"}) == 403
    assert status(address, "/", headers={"Origin": "https://evil.example"}) == 403
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + bytes(26 * 2**20)
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert status(address, "/gradio_api/upload", data=body + b"\r\n--x--\r\n", headers=headers) == 413
