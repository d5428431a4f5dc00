"""Benchmarks count and compare what they say; their times are not judged here."""

import json

import pytest
import torch
from typer.testing import CliRunner

from davae.bases.debug_pipelines import small_pipeline
from davae.benchmark import count_flops
from davae.benchmark.autoencoder import _tiling, bench_autoencoder
from davae.benchmark.inference import bench_inference
from davae.benchmark.timing import peak_tensor_bytes
from davae.benchmark.variants import make_variants
from davae.cli.main import app
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.planner.architectures import find_architecture


@pytest.fixture(scope="module")
def variants():
    return make_variants(find_architecture("debug-sd3"), resolution=128, scales=(2, 4), steps=2)


def test_tokens_and_sizes_of_the_contestants(variants):
    tokens = {c.name: c.tokens for c in variants}
    assert tokens["native"] == 4 * tokens["upgraded x2"] == 16 * tokens["upgraded x4"]
    assert tokens["base"] == tokens["upgraded x2"] == tokens["decoder alone x2"]
    assert tokens["upgraded x4"] == tokens["decoder alone x4"]
    for variant in variants:
        with torch.no_grad():
            image = variant.vae.decode(variant.latent).sample
        assert image.shape[-2:] == (variant.resolution, variant.resolution)
    assert [c.resolution for c in variants] == [64, 128, 128, 128, 128, 128]


def test_counts_are_those_of_the_calls_that_are_timed(variants):
    for variant in [*variants[:3], variants[-1]]:
        assert variant.step_flops() == count_flops(variant.step)
        assert variant.decode_flops() == count_flops(variant.decode)


def test_the_whole_image_is_its_text_its_steps_and_its_decoder(variants):
    native = variants[1]
    assert native.text_flops() > 0
    parts = native.text_flops() + 2 * native.step_flops() + native.decode_flops()
    assert count_flops(native.image) == parts


def test_text_is_encoded_for_both_passes_of_guidance_at_once(variants):
    native, upgraded = variants[1], variants[2]
    seen = []
    for name, encoder in native.text.encoders.items():
        encoder.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: seen.append((name, tuple(kwargs["input_ids"].shape))),
            with_kwargs=True,
        )
    native.encode_text()
    length = {name: shape[1] for name, shape in seen}
    assert [shape[0] for _, shape in seen] == [native.passes] * 3 == [2] * 3
    assert length == {"text_encoder": 77, "text_encoder_2": 77, "text_encoder_3": 256}
    assert upgraded.text is native.text


def test_a_base_that_describes_no_text_encoder_has_no_text_seconds():
    result = bench_inference("debug", resolution=32, repeats=1, steps=1, device="cpu")
    assert {row.text_seconds for row in result.rows} == {None}
    assert {row.text_flops for row in result.rows} == {0}
    assert {row.whole_image_seconds for row in result.rows} == {None}


def test_rows_add_up():
    result = bench_inference("debug-sd3", resolution=64, repeats=2, steps=3, device="cpu", end_to_end=True)
    rows = {row.name: row for row in result.rows}
    native, upgraded = rows["native"], rows["upgraded x2"]
    assert native.speedup == pytest.approx(1.0)
    assert native.flop_limited_speedup == 1.0
    operations = [r.text_flops + 3 * r.step_flops + r.decode_flops for r in (native, upgraded)]
    assert native.whole_image_speedup == pytest.approx(1.0)
    assert upgraded.share == pytest.approx(upgraded.whole_image_speedup / upgraded.flop_limited_speedup)
    assert upgraded.whole_image_seconds > 0
    assert upgraded.flop_limited_speedup == pytest.approx(operations[0] / operations[1])
    assert upgraded.achieved_flops * upgraded.image_seconds == pytest.approx(operations[1])
    assert json.loads(json.dumps(result.to_json()))["rows"][2]["share"] == pytest.approx(upgraded.share)


def test_autoencoder_rows_and_tiles():
    result = bench_autoencoder("debug-sd3", resolution=64, repeats=1, tile=32, device="cpu")
    rows = {row.name: row for row in result.rows}
    assert list(rows) == ["base", "base, tiled", "upgraded", "upgraded, tiled", "decoder alone", "decoder alone, tiled"]
    assert rows["base"].decode_over_base == rows["base, tiled"].decode_over_base == 1.0
    assert rows["upgraded, tiled"].decode_memory_bytes < rows["upgraded"].decode_memory_bytes


def test_a_base_that_makes_films_is_timed_on_images():
    result = bench_autoencoder("debug-qwenimage", resolution=64, repeats=1, device="cpu")
    assert [row.name for row in result.rows] == ["base", "upgraded", "decoder alone"]
    rows = bench_inference("debug-qwenimage", resolution=64, repeats=1, steps=1, device="cpu").rows
    assert all(row.decode_flops > 0 for row in rows)


def test_both_autoencoders_are_cut_into_tiles_of_the_same_size():
    """DC-AE and the video autoencoders name their tiles' sides otherwise."""
    vae = small_pipeline("sana").vae
    _tiling(vae, 64)
    assert (vae.tile_sample_min_height, vae.tile_sample_min_width) == (64, 64)
    # Three quarters of it are no multiple of the 32 pixels that one latent position covers.
    assert vae.tile_sample_stride_height == vae.tile_sample_stride_width == 32
    upgraded = AutoencoderDA.from_base(vae, scale=2, detail_channels=8)
    _tiling(upgraded, 64)
    assert (upgraded.tile_sample_min_height, upgraded.tile_sample_min_width) == (64, 64)


def test_the_upgraded_decoder_takes_no_more_memory_than_the_bases():
    base, upgraded, _ = bench_autoencoder("debug-sd3", resolution=128, repeats=1, device="cpu").rows
    assert upgraded.decode_memory_bytes <= base.decode_memory_bytes


def test_peak_memory_by_hand():
    """Two results of 4 kB alive at once, a third after one of them has gone; views cost nothing."""
    x = torch.ones(1000)

    def call():
        a = x + 1
        b = a * 2
        b.view(10, 100).add_(1)
        del a
        return b + 1

    assert peak_tensor_bytes(call) == 2 * 4000


def test_mistakes_are_told():
    with pytest.raises(DavaeError, match="36 pixels are not a multiple of 8"):
        make_variants(find_architecture("debug-sd3"), resolution=72)
    with pytest.raises(DavaeError, match="dtype must be"):
        bench_inference("debug-sd3", resolution=64, dtype="int8")


def test_the_verb_writes_its_json(tmp_path):
    file = tmp_path / "bench" / "result.json"
    arguments = ["bench", "inference", "debug-sd3", "--resolution", "64", "--repeats", "1", "--steps", "1"]
    done = CliRunner().invoke(app, [*arguments, "--json", str(file), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    names = {row["name"] for row in json.loads(file.read_text())["rows"]}
    assert names == {"base", "native", "upgraded x2", "decoder alone x2"}
