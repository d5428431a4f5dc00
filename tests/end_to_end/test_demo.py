"""The demo's path, on the debug recipe: every figure is there and the identities hold."""

import json

import pytest
from tests.data.files import image_folder

from davae.bases.tiny import debug_base
from davae.cli.tables import print_demo
from davae.demo import run_demo
from davae.errors import DavaeError
from davae.evaluation.upscalers import Upscaler
from davae.report import Summary
from davae.runtime.resizing import upscaled


class _Bicubic(Upscaler):
    place, kind, parameters, factor, weights = "nowhere", "bicubic", 0, 2, ""

    def _enlarged(self, images, seeds, texts):
        return upscaled(images, (2 * images.shape[-2], 2 * images.shape[-1]))


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("davae.demo.open_upscalers", lambda places: {name: _Bicubic() for name in places})
        return run_demo(out, recipe="debug", upscalers={"bicubic": "nowhere"}), out


def test_an_upscaler_stands_beside_the_base_that_it_enlarges(demo, capsys):
    """A bicubic one is the row that is always there, in every figure and picture."""
    summary = Summary.read(demo[1])
    rebuilt, made = summary.reconstruction, summary.generation
    assert rebuilt.others["bicubic"]["psnr"] == pytest.approx(rebuilt.psnr_base_upscaled, abs=1e-4)
    assert made.swd_levels_others["bicubic"] == pytest.approx(made.swd_levels_base_upscaled, abs=1e-4)
    assert "--upscaler bicubic=nowhere" in summary.command
    assert demo[0].read_text().count("enlarged by bicubic") == 2
    print_demo(summary)
    assert capsys.readouterr().out.count("; bicubic ") == 2
    with pytest.raises(DavaeError, match="has a row of that name already"):
        run_demo(demo[1] / "other", recipe="debug", upscalers={"upgraded": "nowhere"})


def test_one_file_with_its_pictures_inside(demo):
    report, out = demo
    text = report.read_text()
    assert report == out / "report.html"
    assert text.count("data:image/png;base64,") > 10
    assert 'src="figures/' not in text


def test_the_summary_holds_every_figure(demo):
    _, out = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == {"base": 16, "native": 64, "decoder_alone": 16, "upgraded": 16}
    for way in ("upgraded", "base_upscaled", "decoder_alone"):
        assert summary["reconstruction"][f"psnr_{way}"] > 0
        assert summary["generation"][f"swd_finest_{way}"] > 0
    assert summary["wall_seconds"] > 0
    assert summary["peak_memory_bytes"] > 2**20
    flops = summary["flops_per_image"]
    assert flops["native"] > 3 * flops["base"]
    assert flops["base"] < flops["decoder_alone"] < flops["upgraded"] < flops["native"]
    assert all(value > 0 for value in summary["seconds_per_image"].values())


def test_the_identities_of_the_method(demo):
    _, out = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["alignment"]["base_latents_equal"] is True
    assert summary["warm_start"]["max_detail_output"] == 0
    assert summary["warm_start"]["max_base_difference"] <= 1e-6


def test_every_phase_has_its_time_and_samples_their_distance(demo):
    _, out = demo
    summary = Summary.read(out)
    assert list(summary.phases) == ["autoencoder", "diffusion", "reconstruction", "samples", "cost"]
    assert sum(summary.phases.values()) <= summary.wall_seconds
    assert summary.generation.preview_drift > 0
    assert summary.unknown_classes == []
    assert not summary.unlabelled
    assert summary.reconstruction.psnr_base_native is not None
    assert summary.command == f"davae demo --out {out.name} --seed 0 --recipe debug --upscaler bicubic=nowhere"


def test_the_terminal_tells_every_unit_once(demo, capsys):
    print_demo(Summary.read(demo[1]))
    printed = capsys.readouterr().out
    for name in ("tokens", "GFLOP", "seconds"):
        assert f" {name} " in printed
    assert "per image" not in printed
    assert printed.count("next: ") >= 1
    assert "decoder alone" in printed.partition("GFLOP")[0]  # a column
    assert printed.count("; decoder alone ") == 2  # of reconstructions and samples


def test_a_base_that_is_an_autoencoder_alone_is_compared_with_itself_at_full_size(tmp_path):
    debug_base().vae.save_pretrained(tmp_path / "base")
    photos = image_folder(tmp_path / "photos", {"a": 6, "b": 6})
    few = ["data.resolution=32", "autoencoder.loop.steps=2"]
    options = {"base": str(tmp_path / "base"), "data": str(photos), "recipe": "debug", "overrides": few}
    report = run_demo(tmp_path / "run", **options)
    summary = Summary.read(tmp_path / "run")
    assert (summary.generation, summary.warm_start) == (None, None)
    assert summary.not_generated.startswith("base is an autoencoder alone, so nothing was generated")
    assert summary.settings["autoencoder"]["model"]["detail_channels"] == 12  # three times the base's 4
    assert summary.reconstruction.images == 3  # about a tenth of twelve, by their names
    assert (summary.tokens.base, summary.tokens.native, summary.tokens.upgraded) == (16, 64, 16)
    assert summary.alignment.base_latents_equal
    assert summary.title == "davae over base, on photos"
    page = report.read_text()
    assert "an autoencoder alone, so nothing was generated" in page
    assert "Base at full size" in page
    assert not (tmp_path / "run" / "diffusion").exists()
    assert run_demo(tmp_path / "run", **options) == report  # the same command goes on, here from the end
    with pytest.raises(DavaeError, match="name their folder with --data"):
        run_demo(tmp_path / "other", base=str(tmp_path / "base"))


def test_a_base_that_takes_prompts_gives_its_autoencoder_alone(tmp_path):
    photos = image_folder(tmp_path / "photos", {"a": 4})
    few = ["data.resolution=32", "autoencoder.loop.steps=1"]
    run_demo(tmp_path / "run", base="debug-sd3", data=str(photos), recipe="debug", overrides=few)
    assert "debug-sd3 takes prompts" in Summary.read(tmp_path / "run").not_generated


def test_classes_that_the_base_does_not_know_are_told(tmp_path):
    photos = image_folder(tmp_path / "photos", {"zebra": 4, "yak": 4})
    few = ["autoencoder.loop.steps=1", "diffusion.loop.steps=1"]
    report = run_demo(tmp_path / "run", base="debug", data=str(photos), recipe="debug", overrides=few)
    summary = Summary.read(tmp_path / "run")
    assert summary.unknown_classes == ["yak", "zebra"]
    assert summary.unlabelled
    assert summary.image_size.upgraded == 2 * 16  # the size that the transformer makes
    assert "does not know yak, zebra: their images were trained without a label" in report.read_text()


def test_a_base_recipe_is_refused(tmp_path):
    with pytest.raises(DavaeError, match="which the demo needs"):
        run_demo(tmp_path, recipe="tiny-base")
