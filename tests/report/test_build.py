import json
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from davae.errors import DavaeError
from davae.recipes.read import load_recipe
from davae.report import STAGES, FigureRecorder, Generation, Summary, build_report, usual_run, words
from davae.report.build import REPORT_FILE
from tests.report.conftest import make_summary

PAGE = (files("davae.report") / REPORT_FILE).read_text(encoding="utf-8")

VOID = {"meta", "link", "img", "br", "input"}
SCRIPTS = re.compile(r"<script>.*?</script>", re.S)


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
        if not {"style", "script"} & set(self.open):
            self.text += f"{data} "


@pytest.fixture
def page(run_dir: Path) -> str:
    path = build_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_stands_alone(page: str) -> None:
    parsed = _Page(page)
    assert [attributes for tag, attributes in parsed.tags if tag == "script"] == [{}]  # the page's own, inside
    for tag, attributes in parsed.tags:
        assert tag not in ("iframe", "object")
        assert not [name for name in attributes if name.startswith("on")]
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
    assert SCRIPTS.findall(page) == SCRIPTS.findall(PAGE)
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
    assert SCRIPTS.findall(text) == SCRIPTS.findall(PAGE)
    assert "<script>alert('prompt')</script>" in parsed.text


def test_every_picture_is_there_and_described(page: str) -> None:
    pictures = [attributes for tag, attributes in _Page(page).tags if tag == "img"]
    assert len(pictures) == 2 * 4 * 2 + 2 * 3 * 2  # rows x columns, each whole and magnified
    assert all((p["src"] or "").startswith("data:image/png;base64,iVBOR") for p in pictures)
    assert all(p["alt"] for p in pictures)
    drawings = [a for tag, a in _Page(page).tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert len(drawings) == 6  # two stages, two maps, two groups of spectra
    assert all(a["role"] == "img" and a["aria-label"] for a in drawings)


def test_headline_and_table_carry_the_runs_numbers(page: str) -> None:
    text = " ".join(_Page(page).text.split())
    assert (
        "32 × 32 pixel images from 4 tokens instead of the 16 that the base takes for this size, 3.0 times as fast. "
        "It rebuilds held-out images 2.2 dB closer to the original than enlarging the base, "
        "and its samples are 25 % closer to real images"
    ) in text
    assert "0.050 away from the base's own samples" in text
    assert "two seeds are 0.40 apart, so the scene is kept" in text
    assert "−25 %" in text  # sliced Wasserstein distance
    assert "4.40 G 1.05 G 1.10 G 4.0×" in text  # native, decoder alone, upgraded, ratio
    assert "100 ms 360 ms 110 ms 120 ms 3.0×" in text
    assert "autoencoder.learning_rate 0.0003" in text


def test_a_worse_result_is_told_as_it_is(run_dir: Path) -> None:
    worse = make_summary()
    data = worse.model_dump()
    data["reconstruction"]["psnr_upgraded"] = 23.0
    data["generation"]["swd_finest_upgraded"] = data["generation"]["swd_levels_upgraded"][0] = 0.5
    data |= {"unlabelled": True, "unknown_classes": ["hat", "dress"]}
    data["seconds_per_image"]["upgraded"] = 0.72
    data["alignment"]["base_latents_equal"] = False
    type(worse).model_validate(data).write(run_dir)
    page = build_report(run_dir).read_text(encoding="utf-8")
    text = _Page(page).text
    assert "2.0 times more slowly" in text
    assert "and its samples are 25 % farther from real images at the finest scale than the base's" in text
    assert "does not know hat, dress: their images were trained without a label. So the samples are of no class" in text
    assert 'class="strong">25.25 dB' in page  # the best one is bold, here the decoder alone
    assert 'class="strong">0.250' in page
    assert page.count('class="strong"') == 4  # fewer tokens and operations, and these
    for advice in ("autoencoder.loop.steps=", "diffusion.loop.steps=", "davae train base"):
        assert advice in text
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
    assert "There are no losses to draw in diffusion/metrics.jsonl" in " ".join(text.split())


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


def test_the_headline_looks_at_every_scale_of_the_samples_and_at_their_scenes() -> None:
    made = {
        "swd_finest_upgraded": 0.29,
        "swd_finest_base_upscaled": 0.38,
        "swd_levels_upgraded": [0.29, 0.24, 0.19, 0.25],
        "swd_levels_base_upscaled": [0.38, 0.09, 0.08, 0.69],
        "preview_drift": 0.49,
        "seeds_apart": 0.51,
    }
    summary = make_summary(generation=Generation(**made))
    _, samples, scenes = words.headline(summary)
    assert samples.endswith(
        "samples are 24 % closer to real images at the finest scale than the base's, but farther at 16 px and 8 px."
    )
    assert scenes == "They show other scenes than the base's from the same seeds."
    quick = words.headline(summary.model_copy(update={"quick": True}))
    assert "shows that everything works, not how well" in quick[0]
    assert quick[1:] == words.headline(summary)
    assert "the scene changes" in words.scene(summary)
    assert "diffusion.tune.mode=lora" in dict(words.next_steps(summary)).values()


def test_a_slider_takes_its_two_pictures_from_the_rows_beside_it(page: str) -> None:
    sliders = [a for tag, a in _Page(page).tags if a.get("class") == "slider"]
    assert [s["data-pair"] for s in sliders] == ["1 3", "0 2"]
    assert all("hidden" in s for s in sliders)  # until the script shows it; paper and readers without scripts have rows
    ranges = [a for tag, a in _Page(page).tags if tag == "input"]
    assert [r["type"] for r in ranges] == ["range", "range"]
    assert ranges[0]["aria-label"] == "Where Base, enlarged ends and Upgraded begins"
    assert page.count("<option") == 4


def test_an_autoencoder_alone_has_a_page_without_samples(run_dir: Path) -> None:
    recorder = FigureRecorder(run_dir, curves=STAGES[:1])
    images = torch.zeros(1, 3, 32, 32)
    recorder.add_reconstructions(images, images[..., :16, :16], images, ["one"], native=images)
    recorder.write()
    rebuilt = {"psnr_upgraded": 28.5, "psnr_base_upscaled": 27.0, "psnr_base_native": 30.0, "psnr_reduced": 27.5}
    alone = make_summary().model_dump() | {
        "generation": None,
        "warm_start": None,
        "reconstruction": rebuilt,
        "not_generated": "some/base is an autoencoder alone, so nothing was generated",
    }
    Summary.model_validate(alone).write(run_dir)
    page = build_report(run_dir).read_text(encoding="utf-8")
    text = " ".join(_Page(page).text.split())
    assert "With 4 latent positions for 32 × 32 pixels this run rebuilds held-out images 1.5 dB closer" in text
    assert "The base at full size comes 1.5 dB closer to it, from 4.0 times the positions." in text
    assert "some/base is an autoencoder alone, so nothing was generated." in text
    assert "27.00 dB 28.50 dB 30.00 dB 27.50 dB higher" in text
    assert "Base at full size" in text
    for absent in ("Generation", "widened transformer", "tokens per image", "samples are"):
        assert absent not in text


def test_the_decoder_alone_stands_between_and_an_earlier_run_has_none(run_dir: Path) -> None:
    text = " ".join(_Page(build_report(run_dir).read_text(encoding="utf-8")).text.split())
    assert "Base Native Decoder alone Upgraded Ratio" in text
    assert "Base, enlarged Decoder alone Upgraded Better Reconstruction, PSNR 24.00 dB 25.25 dB 26.25 dB" in text
    assert "Generation, distance at 32 px (finest) 0.400 0.250 0.300 lower" in text
    earlier = make_summary().model_dump()
    for part in ("image_size", "tokens", "flops_per_image", "seconds_per_image"):
        del earlier[part]["decoder_alone"]
    del earlier["reconstruction"]["psnr_decoder_alone"], earlier["generation"]["swd_finest_decoder_alone"]
    earlier["generation"] |= {"swd_levels_base_upscaled": [0.4, 0.2]}
    Summary.model_validate(earlier).write(run_dir)
    page = _Page(build_report(run_dir).read_text(encoding="utf-8")).text.partition("What an image costs")[2]
    text = " ".join(page.split())
    assert "Base Native Upgraded Ratio" in text
    assert "Base, enlarged Upgraded Better Reconstruction, PSNR 24.00 dB 26.25 dB higher" in text
    assert "Generation, distance at 16 px 0.200 0.100 lower" in text


def test_the_shipped_upgrade_stands_beside_and_is_not_the_best_of_this_run(run_dir: Path) -> None:
    summary = make_summary()
    others = {"shipped upgrade": {"psnr": 27.5, "ssim": 0.9}, "esrgan": {"psnr": 24.5, "ssim": 0.7}}
    rebuilt = summary.reconstruction.model_copy(update={"others": others})
    distances = {"shipped upgrade": [0.125, 0.1], "esrgan": [0.375, 0.2]}
    made = summary.generation.model_copy(update={"swd_levels_others": distances})
    summary.model_copy(update={"reconstruction": rebuilt, "generation": made}).write(run_dir)
    page = build_report(run_dir).read_text(encoding="utf-8")
    text = " ".join(_Page(page).text.split())
    assert (
        "Upgraded Shipped upgrade Esrgan Better Reconstruction, PSNR 24.00 dB 25.25 dB 26.25 dB 27.50 dB 24.50 dB"
        in text
    )
    assert "(finest) 0.400 0.250 0.300 0.125 0.375 lower" in text
    assert '<td class="strong">26.25 dB</td><td>27.50 dB</td>' in page
    longer = "Let the transformer learn for longer"
    assert longer in text
    assert longer not in dict(words.next_steps(make_summary()))
    assert any(longer in told for told, _ in words.next_steps(Summary.read(run_dir)))


def test_what_a_recorded_run_reached_stands_beside(run_dir: Path) -> None:
    recorded = json.loads((files("davae.report") / "usual" / "tiny.json").read_text(encoding="utf-8"))
    make_summary(settings=recorded["settings"]).write(run_dir)
    text = " ".join(_Page(build_report(run_dir).read_text(encoding="utf-8")).text.split())
    assert f"This demo usually reaches {recorded['reconstruction']['psnr_upgraded']:.1f} dB" in text
    assert f"24.00 dB 25.25 dB 26.25 dB {recorded['reconstruction']['psnr_upgraded']:.2f} dB higher" in text
    recorded["settings"]["autoencoder"]["loop"]["steps"] += 1
    make_summary(settings=recorded["settings"]).write(run_dir)
    assert "usually" not in build_report(run_dir).read_text(encoding="utf-8")


def test_the_recorded_run_is_of_the_demos_recipe() -> None:
    """Else nothing stands beside any more: put the ``summary.json`` of a new ``davae demo`` in its place."""
    assert usual_run(load_recipe("tiny").model_dump(mode="json")) is not None
