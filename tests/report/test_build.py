import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from davae.errors import DavaeError
from davae.report import FigureRecorder, build_report
from tests.report.conftest import make_summary

VOID = {"meta", "link", "img", "br", "input"}


class _Page(HTMLParser):
    """Checks that tags nest, and remembers tags, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += f"{data} "


@pytest.fixture
def page(run_dir: Path) -> str:
    path = build_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_stands_alone(page: str) -> None:
    parsed = _Page(page)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:", "#")), f"<{tag} {name}={address[:60]}>"
    assert not re.search(r"@import|@font-face", page)
    assert not [u for u in re.findall(r"https?://[^\s\"'<]+", page) if not u.startswith("http://www.w3.org/")]
    # Only drawings inside the page may be referred to by url().
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_ids_are_unique_and_links_lead_somewhere(page: str) -> None:
    parsed = _Page(page)
    ids = [a["id"] for _, a in parsed.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = [a.get(name) or "" for _, a in parsed.tags for name in ("href", "xlink:href")]
    inside = {target[1:] for target in targets if target.startswith("#")}
    assert inside
    assert inside <= set(ids)


def test_names_from_outside_show_as_text(page: str) -> None:
    parsed = _Page(page)
    assert "<script" not in page
    assert "<script>alert('class')</script>" in parsed.text
    assert "A run <b>of tests</b>" in parsed.text
    assert "davae demo --out 'runs/<demo>'" in parsed.text
    assert "<img src=x>.png" in parsed.text
    assert "brick & weave" in parsed.text


def test_a_prompt_with_a_script_is_text(run_dir: Path) -> None:
    """As the caption of a picture, as its description and in the settings of the run."""
    prompt = "a fox\"'></td><script>alert('prompt')</script>"
    recorder = FigureRecorder(run_dir, classes=[prompt])
    images = torch.zeros(1, 3, 32, 32)
    recorder.add_samples(images[..., :16, :16], images, [prompt])
    recorder.write()
    make_summary(settings={"diffusion": {"prompts": {"validation": [prompt]}}}).write(run_dir)
    text = build_report(run_dir).read_text(encoding="utf-8")
    parsed = _Page(text)
    assert "<script" not in text
    assert "script" not in [tag for tag, _ in parsed.tags]
    assert "<script>alert('prompt')</script>" in parsed.text


def test_every_picture_is_there_and_described(page: str) -> None:
    pictures = [attributes for tag, attributes in _Page(page).tags if tag == "img"]
    assert len(pictures) == 2 * 3 * 2 + 2 * 2 * 2  # rows x columns, each whole and magnified
    assert all((p["src"] or "").startswith("data:image/png;base64,iVBOR") for p in pictures)
    assert all(p["alt"] for p in pictures)
    drawings = [a for tag, a in _Page(page).tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(drawings) == 6  # two stages, two maps, two groups of spectra
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_headline_and_table_carry_the_runs_numbers(page: str) -> None:
    text = " ".join(_Page(page).text.split())
    assert (
        "32 × 32 pixel images from 4 tokens instead of 16, 3.0 times as fast as the base model does, "
        "and rebuilds held-out images 2.2 dB closer"
    ) in text
    assert "−25 %" in text  # sliced Wasserstein distance
    assert "4.40 G 1.10 G 4.0×" in text  # native, upgraded, ratio
    assert "100 ms 360 ms 120 ms 3.0×" in text
    assert "autoencoder.learning_rate 0.0003" in text


def test_a_worse_result_is_told_as_it_is(run_dir: Path) -> None:
    worse = make_summary()
    data = worse.model_dump()
    data["reconstruction"]["psnr_upgraded"] = 23.0
    data["seconds_per_image"]["upgraded"] = 0.72
    data["alignment"]["base_latents_equal"] = False
    type(worse).model_validate(data).write(run_dir)
    text = _Page(build_report(run_dir).read_text(encoding="utf-8")).text
    assert "2.0 times more slowly" in text
    assert "1.0 dB farther from the original" in text
    assert "The base part of the latents differs" in text


def test_the_image_spectrum_marks_what_the_base_can_hold(page: str) -> None:
    images, latents = re.findall(r'<svg[^>]*aria-label="Radial power.*?</svg>', page, flags=re.DOTALL)
    assert "stroke-dasharray" in images
    assert "stroke-dasharray" not in latents


def test_drawings_take_their_colours_from_the_page(page: str) -> None:
    drawings = "".join(re.findall(r'<svg viewBox="[^"]*" xmlns.*?</svg>', page, flags=re.DOTALL))
    assert "var(--s1)" in drawings
    assert "var(--soft)" in drawings
    assert "#0a0a" not in drawings
    assert "#0b00" not in drawings
    assert 'width="' not in drawings.split(">", 1)[0]


def test_the_same_files_give_the_same_bytes(run_dir: Path) -> None:
    first = build_report(run_dir).read_bytes()
    assert build_report(run_dir).read_bytes() == first


def test_a_stage_without_losses_says_so(run_dir: Path) -> None:
    (run_dir / "diffusion" / "metrics.jsonl").unlink()
    text = _Page(build_report(run_dir).read_text(encoding="utf-8")).text
    assert "No losses were logged in diffusion/metrics.jsonl" in " ".join(text.split())


def test_mistakes_are_named(run_dir: Path) -> None:
    with pytest.raises(DavaeError, match="no run directory"):
        build_report(run_dir / "absent")

    figures = json.loads((run_dir / "figures.json").read_text())
    picture = figures["sections"][0]["rows"][0]["pictures"][0]
    picture["file"] = "../secret.png"
    (run_dir / "figures.json").write_text(json.dumps(figures))
    with pytest.raises(DavaeError, match="outside the run directory"):
        build_report(run_dir)
    picture["file"] = "summary.json"
    (run_dir / "figures.json").write_text(json.dumps(figures))
    with pytest.raises(DavaeError, match="not a PNG"):
        build_report(run_dir)

    summary = json.loads((run_dir / "summary.json").read_text())
    del summary["tokens"]["native"]
    (run_dir / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(DavaeError, match=r"summary\.json: tokens\.native: Field required"):
        build_report(run_dir)
    (run_dir / "summary.json").unlink()
    with pytest.raises(DavaeError, match=r"summary\.json does not exist"):
        build_report(run_dir)
