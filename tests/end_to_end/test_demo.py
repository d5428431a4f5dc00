"""The demo's path, on the debug recipe: every figure is there and the identities hold."""

import json

import pytest

from davae.demo import run_demo
from davae.errors import DavaeError


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return run_demo(out, recipe="debug"), out


def test_one_file_with_its_pictures_inside(demo):
    report, out = demo
    text = report.read_text()
    assert report == out / "report.html"
    assert text.count("data:image/png;base64,") > 10
    assert 'src="figures/' not in text


def test_the_summary_holds_every_figure(demo):
    _, out = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == {"base": 16, "native": 64, "upgraded": 16}
    assert set(summary["reconstruction"]) >= {"psnr_upgraded", "psnr_base_upscaled"}
    assert set(summary["generation"]) >= {"swd_finest_upgraded", "swd_finest_base_upscaled"}
    assert summary["wall_seconds"] > 0
    assert summary["peak_memory_bytes"] > 2**20
    flops = summary["flops_per_image"]
    assert flops["native"] > 3 * flops["base"]
    assert flops["base"] < flops["upgraded"] < flops["native"]
    assert all(value > 0 for value in summary["seconds_per_image"].values())


def test_the_identities_of_the_method(demo):
    _, out = demo
    summary = json.loads((out / "summary.json").read_text())
    assert summary["alignment"]["base_latents_equal"] is True
    assert summary["warm_start"]["max_detail_output"] == 0
    assert summary["warm_start"]["max_base_difference"] <= 1e-6


def test_a_base_recipe_is_refused(tmp_path):
    with pytest.raises(DavaeError, match="which the demo needs"):
        run_demo(tmp_path, recipe="tiny-base")
