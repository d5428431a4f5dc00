"""Autoencoders side by side: metrics of known reconstructions, budgets, one transformer over several latents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from PIL import Image
from typer.testing import CliRunner

from davae.bases.tiny import debug_base
from davae.cli.main import app
from davae.cli.options import named_values
from davae.cli.tables import comparison_table
from davae.errors import DavaeError
from davae.evaluation.features import Features
from davae.evaluation.metrics.image_set import ImageSet, compare_sets
from davae.evaluation.reconstruction.baselines import compare_reconstructions
from davae.experiments.compare import (
    DiffusionOptions,
    compare_autoencoders,
    open_candidates,
    score_autoencoders,
)
from davae.experiments.compare.diffusion import TinyRun, transformer_size
from davae.models import AutoencoderDA
from davae.models.latent_space import compression_of, decode, encode, open_autoencoder
from davae.models.lightningdit import SIZES
from tests.evaluation.test_upscalers import Nearest

SIZE = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}


def kl(levels: int = 2, channels: int = 4) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
    ).eval()


def dc() -> AutoencoderDC:
    torch.manual_seed(0)
    return AutoencoderDC(
        latent_channels=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
    ).eval()


def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()


class Exact(AutoencoderTiny):
    """Keeps every pixel: a latent of f1 with the image in it."""

    def encode(self, x: torch.Tensor) -> AutoencoderTinyOutput:
        return AutoencoderTinyOutput(latents=x)

    def decode(self, z: torch.Tensor) -> object:
        return type("Decoded", (), {"sample": z})()


@pytest.mark.parametrize("make", [kl, dc, tiny, lambda: AutoencoderDA.from_base(kl(), scale=2, detail_channels=4)])
def test_every_kind_is_opened_and_used_alike(make, tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path / "pipeline" / "vae")
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "vae"):
        opened = open_autoencoder(folder)
        assert type(opened).__name__ == type(model).__name__
    latent = encode(opened, torch.randn(1, 3, 32, 32))
    assert latent.shape[1] == opened.config.latent_channels
    assert 32 // latent.shape[-1] == compression_of(opened)
    assert decode(opened, latent).shape == (1, 3, 32, 32)


def test_a_lossless_autoencoder_scores_perfectly_and_a_random_one_does_not() -> None:
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    exact = Exact(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
        latent_channels=3,
    )
    candidates = open_candidates({"exact": exact, "random": kl()}, 32)
    rows, made = score_autoencoders(candidates, images, batch=2, repeats=1)
    exact_row, random_row = rows
    assert torch.equal(made["exact"], images)
    assert exact_row.figures["psnr"] == float("inf")
    assert exact_row.figures["ssim"] == pytest.approx(1)
    assert exact_row.figures["swd/finest"] == pytest.approx(0, abs=1e-6)
    assert exact_row.figures["spectrum_db"] == pytest.approx(0, abs=1e-6)
    assert random_row.figures["psnr"] < 20
    assert random_row.figures["spectrum_db"] > 1
    assert (random_row.compression, random_row.channels, random_row.tokens) == (2, 4, 256)
    assert random_row.parameters == sum(p.numel() for p in kl().parameters())


def test_one_token_budget_is_reached_by_the_patch() -> None:
    found = open_candidates({"f2": kl(), "f8": dc()}, 32, tokens=16)
    assert [(c.patch, c.tokens) for c in found] == [(4, 16), (1, 16)]
    with pytest.raises(
        DavaeError, match=r"f8: its latent of 4 x 4 cannot be divided into 64 tokens; possible are 16, 4, 1"
    ):
        open_candidates({"f2": kl(), "f8": dc()}, 32, tokens=64)


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match="f8: 36 pixels are not a multiple of its compression, 8; the nearest is 32"):
        open_candidates({"f8": dc()}, 36)
    with pytest.raises(DavaeError, match="holds no autoencoder"):
        open_candidates({"none": tmp_path}, 32)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(DavaeError, match="holds a UNet2DModel"):
        open_autoencoder(tmp_path)
    with pytest.raises(DavaeError, match="autoencoder a: write NAME="):
        named_values(["a"], "autoencoder", "a=b")
    with pytest.raises(DavaeError, match="given twice"):
        named_values(["a=b", "a=c"], "autoencoder", "a=b")
    with pytest.raises(DavaeError, match="size '3x4' is unknown"):
        transformer_size("3x4")
    assert transformer_size("xl") == SIZES["XL"]
    assert transformer_size("16x1x2") == SIZE


def test_trials_see_the_same_batches_and_their_latents_are_normalised() -> None:
    options = DiffusionOptions(steps=2, batch=3, size=SIZE)
    images, labels = torch.rand(6, 3, 16, 16) * 2 - 1, torch.arange(6) % 2
    candidate = open_candidates({"f2": kl()}, 16)[0]
    first, second = (TinyRun(candidate, images, labels, 2, options) for _ in range(2))
    torch.testing.assert_close(first.latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.latents.std((0, 2, 3)), torch.ones(4))
    assert [first.step(i) for i in range(2)] == [second.step(i) for i in range(2)]
    assert torch.equal(first.sampled(labels[:2]), second.sampled(labels[:2]))


def test_training_on_one_image_finds_it_again() -> None:
    """The whole chain: with a single image the samples come to look like it."""
    images = (torch.linspace(-1, 1, 16).view(1, 1, 1, 16) * torch.tensor([1.0, -1.0, 0.5]).view(1, 3, 1, 1)).expand(
        1, 3, 16, 16
    )
    exact = Exact(
        encoder_block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        num_encoder_blocks=(1,),
        num_decoder_blocks=(1,),
        latent_channels=3,
    )
    candidate = open_candidates({"f1": exact}, 16, tokens=16)[0]
    options = DiffusionOptions(
        steps=150,
        batch=8,
        size={**SIZE, "hidden_size": 32},
        learning_rate=5e-3,
        sample_steps=8,
        guidance=1.0,
        ema=0.9,
    )
    trial = TinyRun(candidate, images, torch.zeros(1, dtype=torch.long), 1, options)
    losses = [trial.step(number) for number in range(options.steps)]
    assert losses[-1] < 0.5 * losses[0]
    made = trial.sampled(torch.zeros(2, dtype=torch.long))
    assert (made - images).abs().mean() < 0.35


def test_the_whole_comparison_with_a_transformer(tmp_path: Path) -> None:
    options = DiffusionOptions(steps=2, batch=2, size=SIZE, samples=2, sample_steps=2, repeats=1)
    result = compare_autoencoders(
        {"f2": kl(), "f8": dc()},
        data="procedural:12",
        resolution=32,
        images=4,
        diffusion=options,
        train_images=6,
        repeats=1,
        device="cpu",
        out=tmp_path,
    )
    few, many = result.diffusion[1], result.diffusion[0]
    assert (many.tokens, few.tokens) == (256, 16)
    assert many.train_speedup == many.sample_speedup == many.train_flop_limited == 1
    assert few.train_flop_limited > 10  # sixteen times fewer tokens, the modulation costs the same
    assert few.sample_flop_limited > 1
    assert abs(many.parameters - few.parameters) < 1000  # the first and the last layer only
    assert json.loads((tmp_path / "comparison.json").read_text()) == json.loads(json.dumps(result.to_json()))
    sheet = Image.open(tmp_path / "samples.png")
    assert sheet.text["Rows"] == "held-out images | f2 | f8"
    assert Image.open(tmp_path / "reconstructions.png").text["Rows"] == "input | f2 | f8"
    assert comparison_table(result).row_count == 17


class Colours:
    """A feature network: the mean colours of the four quarters."""

    name = "colours"

    def __init__(self, name: str = "colours", device: object = None) -> None:
        pass

    def describe(self) -> dict[str, object]:
        return {"network": self.name}

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1))


def test_table_two_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token budget by the patch, one transformer, and every column of the paper's table."""
    monkeypatch.setattr("davae.experiments.compare.comparison.open_network", Colours)

    class Lpips(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean((1, 2, 3))

    monkeypatch.setattr("davae.experiments.compare.comparison.LpipsLoss", lambda file: Lpips())
    options = DiffusionOptions(steps=2, batch=4, size=SIZE, samples=6, sample_steps=1, repeats=1)
    result = compare_autoencoders(
        {"f2": kl(), "f4": AutoencoderDA.from_base(kl(), scale=2, detail_channels=4), "f8": dc()},
        data="procedural:24",
        resolution=32,
        images=6,
        tokens=16,
        diffusion=options,
        train_images=12,
        repeats=1,
        device="cpu",
        features=["colours"],
        lpips=tmp_path,
    )
    assert [row.name for row in result.autoencoders] == ["f2", "f4", "f4, decoder alone", "f8", "base, enlarged"]
    assert [row.patch for row in result.autoencoders] == [4, 2, 2, 1, 2]
    assert {row.tokens for row in result.diffusion} == {16}
    alone, enlarged = result.diffusion[2], result.diffusion[4]
    assert alone.loss == enlarged.loss  # one transformer over one base
    assert alone.figures != enlarged.figures
    blocks = {row.parameters for row in result.diffusion}
    assert max(blocks) - min(blocks) < 3000  # the first and the last layer
    for row in result.autoencoders:
        assert row.figures["lpips"] > 0
        assert row.figures["fid/colours"] > 0
    assert all(row.figures["fid/colours"] > 0 for row in result.diffusion)
    assert result.training_images == 12
    assert result.networks == [{"network": "colours"}]
    named = [str(cell) for cell in comparison_table(result).columns[0].cells]
    assert {
        "LPIPS",
        "rFID, colours",
        "FID of samples, colours",
        "KID of samples, colours",
        "PSNR, dB",
        "SSIM",
    } <= set(named)


def test_other_images_of_the_base_s_latents_stand_beside() -> None:
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    first, second = (AutoencoderDA.from_base(kl(), scale=2, detail_channels=d).eval() for d in (4, 8))
    given = {"first": first, "second": second, "f8": dc()}
    found = open_candidates(given, 32, upscalers={"nearest": Nearest()})
    names = ["first", "first, decoder alone", "second", "second, decoder alone", "f8", "base, enlarged", "nearest"]
    assert [c.name for c in found] == names
    shared = "first, decoder alone"
    assert {c.name: c.latents_of for c in found if c.latents_of} == dict.fromkeys([names[3], *names[5:]], shared)
    rows, _ = score_autoencoders(found, images, batch=2, repeats=1)
    report = compare_reconstructions(first, [images], beside={"second": second}, upscalers={"nearest": Nearest()})
    expected = {shared: "decoder alone"} | {name: name for name in (names[3], *names[5:])}
    for row in rows:
        if row.name in expected:
            assert row.figures["psnr"] == pytest.approx(report.rows[expected[row.name]].figures["psnr"], abs=1e-3)
    assert rows[5].parameters == rows[6].parameters == sum(p.numel() for p in kl().parameters())
    assert [row.kind for row in rows[5:]] == ["AutoencoderKL", "Nearest"]
    # Another base has latents of its own.
    other = AutoencoderDA.from_base(kl().requires_grad_(False).apply(_doubled), scale=2, detail_channels=4)
    found = open_candidates({"first": first, "other": other}, 32)
    assert [c.latents_of for c in found] == [None, None, None, None, shared]
    with pytest.raises(DavaeError, match="compare an AutoencoderDA with details"):
        open_candidates({"f8": dc()}, 32, upscalers={"nearest": Nearest()})
    with pytest.raises(DavaeError, match="'base, enlarged' is the name of two columns"):
        open_candidates({"first": first, "base, enlarged": dc()}, 32)


def _doubled(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.mul_(2)


def test_distances_of_features_are_zero_for_a_lossless_autoencoder() -> None:
    images = torch.rand(8, 3, 32, 32) * 2 - 1

    def distance(made: torch.Tensor) -> float:
        sets = [ImageSet([Colours()], spatial=False).extend(x.split(3)) for x in (made, images)]
        return compare_sets(*sets).figures["fid/colours"]

    assert distance(images) == pytest.approx(0, abs=1e-4)
    assert distance(images + 0.5) == pytest.approx(12 * 0.25, rel=1e-3)


def test_the_verb(tmp_path: Path) -> None:
    debug_base().save_pretrained(tmp_path / "base")
    dc().save_pretrained(tmp_path / "dc")
    asked = [
        "compare",
        "autoencoder",
        f"base={tmp_path / 'base'}",
        f"dc={tmp_path / 'dc'}",
        "--data",
        "procedural:4",
    ]
    options = ["--resolution", "32", "--images", "2", "--repeats", "1", "--json", str(tmp_path / "c.json")]
    done = CliRunner().invoke(app, [*asked, *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "PSNR" in done.output
    written = json.loads((tmp_path / "c.json").read_text())
    assert [row["name"] for row in written["autoencoders"]] == ["base", "dc"]
    assert written["diffusion"] == []
