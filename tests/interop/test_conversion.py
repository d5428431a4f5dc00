"""`davae convert`: published layouts in, diffusers folders out, and what is refused."""

from __future__ import annotations

import json
import logging
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import save_file
from tests.conftest import load_case, parity_cases, relative_error
from tests.interop.test_official_lightningdit import official
from torch import Tensor
from typer.testing import CliRunner

from davae.cli.main import app, main
from davae.errors import DavaeError
from davae.interop.conversion import (
    convert_imagenet_file,
    convert_lightningdit_file,
    convert_sd3_file,
    convert_vavae_file,
    read_statistics,
)
from davae.interop.official_lightningdit import size_name
from davae.interop.official_vavae import convert_vavae
from davae.models import AutoencoderDA, LightningDiTTransformer2DModel
from davae.models.lightningdit import SIZES

WIDTHS, LATENT = (32, 64), 4  # LDM normalises in 32 groups


def ldm_names(vae: AutoencoderKL) -> dict[str, Tensor]:
    """The state dict of a two-level AutoencoderKL in LDM's names, written out by hand."""
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    found = {}
    for name, tensor in vae.state_dict().items():
        for ours, theirs in (
            ("down_blocks.", "down."),
            ("up_blocks.0.", "up.1."),
            ("up_blocks.1.", "up.0."),
            ("mid_block.resnets.0.", "mid.block_1."),
            ("mid_block.resnets.1.", "mid.block_2."),
            ("mid_block.attentions.0.", "mid.attn_1."),
            (".resnets.", ".block."),
            (".attentions.", ".attn."),
            (".downsamplers.0.", ".downsample."),
            (".upsamplers.0.", ".upsample."),
            (".conv_shortcut.", ".nin_shortcut."),
            (".conv_norm_out.", ".norm_out."),
        ):
            name = name.replace(ours, theirs)
        if ".attn" in name:
            for ours, theirs in attention.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        found[name] = tensor.clone()
    return found


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        latent_channels=LATENT,
        layers_per_block=1,
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_vavae_becomes_a_folder_that_diffusers_opens(container: str, vae: AutoencoderKL, tmp_path: Path) -> None:
    training = {
        "loss.discriminator.main.0.weight": torch.zeros(2),
        "foundation_model.model.cls_token": torch.zeros(1),
        "linear_proj.weight": torch.zeros(1),
    }
    state = {**ldm_names(vae), **training}
    file = tmp_path / f"vavae.{container}"
    if container == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3}, file)
    made = convert_vavae_file(file, tmp_path / "vae")
    assert sorted(made.unused) == sorted(training)
    assert "AutoencoderKL f2, 4 channels" in str(made)
    assert "3 tensors of training left out" in str(made)
    opened = AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert list(opened.config.down_block_types) == ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    images = torch.randn(1, 3, 16, 16)
    latent = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(opened.encode(images).latent_dist.mode(), latent)
    torch.testing.assert_close(opened.decode(latent).sample, vae.decode(latent).sample)


def test_vavae_s_running_means_are_preferred_and_said(vae: AutoencoderKL, caplog: pytest.LogCaptureFixture) -> None:
    state = ldm_names(vae)
    frozen = "quant_conv.bias"  # what does not learn has no running mean
    means = {f"model_ema.{n.replace('.', '')}": t + 1 for n, t in state.items() if n != frozen}
    counters = {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(3)}
    with caplog.at_level(logging.INFO, "davae"):
        model, unused = convert_vavae({**state, **means, **counters})
    assert torch.equal(model.encoder.conv_in.weight, vae.encoder.conv_in.weight + 1)
    assert torch.equal(model.quant_conv.bias, vae.quant_conv.bias)
    assert sorted(unused) == sorted(counters)
    assert "using the EMA weights" in caplog.text
    with pytest.raises(DavaeError, match=r"unexpected: model_ema\.other"):
        convert_vavae({**state, "model_ema.other": torch.zeros(1)})


def test_vavae_with_a_key_too_few_or_too_many(vae: AutoencoderKL) -> None:
    state = ldm_names(vae)
    with pytest.raises(DavaeError, match=r"unexpected: encoder\.extra\.weight"):
        convert_vavae({**state, "encoder.extra.weight": torch.zeros(1)})
    del state["decoder.up.0.block.1.conv1.bias"]
    with pytest.raises(DavaeError, match=r"missing: decoder\.up_blocks\.1\.resnets\.1\.conv1\.bias"):
        convert_vavae(state)
    with pytest.raises(DavaeError, match=r"missing: encoder\.conv_in\.weight"):
        convert_vavae({"model.weight": torch.zeros(1)})


def test_lightningdit_becomes_a_folder_of_its_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = official()
    other = {name: tensor + 1 for name, tensor in state.items()}
    torch.save({"model": other, "ema": state, "train_steps": 3}, tmp_path / "dit.pt")
    with caplog.at_level(logging.INFO, "davae"):
        made = convert_lightningdit_file(tmp_path / "dit.pt", tmp_path / "dit")
    assert "taking the weights under 'ema' (not: model, train_steps)" in caplog.text
    assert "LightningDiT-width 16, depth 1, 2 heads, patch 1" in str(made)
    opened = LightningDiTTransformer2DModel.from_pretrained(tmp_path / "dit")
    assert torch.equal(opened.patch_embed.weight, state["x_embedder.proj.weight"])
    with pytest.raises(DavaeError, match=r"is LightningDiT-width 16.*, not XL/1"):
        convert_lightningdit_file(tmp_path / "dit.pt", tmp_path / "again", size="XL/1")
    with pytest.raises(DavaeError, match="is not empty"):
        convert_lightningdit_file(tmp_path / "dit.pt", tmp_path / "dit")


def test_lightningdit_and_its_autoencoder_become_a_pipeline(vae: AutoencoderKL, tmp_path: Path) -> None:
    save_file(official(), tmp_path / "dit.safetensors")
    save_file(ldm_names(vae), tmp_path / "vae.safetensors")
    torch.save({"mean": torch.ones(1, LATENT, 1, 1), "std": torch.full((1, LATENT, 1, 1), 2.0)}, tmp_path / "s.pt")
    run = CliRunner()
    for arguments in (
        ["vavae", "vae.safetensors", "--out", "vae", "--statistics", "s.pt"],
        ["lightningdit", "dit.safetensors", "--out", "pipe", "--vae", "vae"],
    ):
        paths = [str(tmp_path / a) if "." in a or a in ("vae", "pipe") else a for a in arguments[1:]]
        result = run.invoke(app, ["convert", arguments[0], *paths], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert pipe.scheduler.config.shift == pytest.approx(1 / 0.3)
    assert pipe.vae.config.latents_std == [2.0] * LATENT
    assert pipe(0, num_inference_steps=2, output_type="pt").images.shape == (1, 3, 6, 6)


def test_statistics_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(json.dumps({"mean": [[1.0], [2.0]], "std": [1, 2]}))
    assert read_statistics(tmp_path / "s.json") == ([1.0, 2.0], [1.0, 2.0])
    for content, message in (
        ({"mean": [1]}, "must hold 'mean' and 'std'"),
        ({"mean": [1], "std": [0]}, "above 0"),
    ):
        (tmp_path / "s.json").write_text(json.dumps(content))
        with pytest.raises(DavaeError, match=message):
            read_statistics(tmp_path / "s.json")
    with pytest.raises(DavaeError, match="there is no file"):
        read_statistics(tmp_path / "absent.json")


def test_a_pickle_with_code_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    torch.save({"ema": official(), "args": Namespace(lr=1)}, tmp_path / "dit.ckpt")
    with pytest.raises(DavaeError, match=r"run code.*weights_only=False\); torch.save"):
        convert_lightningdit_file(tmp_path / "dit.ckpt", tmp_path / "dit")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(DavaeError, match=r"is no checkpoint: it begins with b'<!DOCTYPE html") as caught:
        convert_lightningdit_file(tmp_path / "page.pt", tmp_path / "dit")
    assert "weights_only" not in str(caught.value)
    (tmp_path / "broken.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(DavaeError, match="cannot be read: it is damaged"):
        convert_lightningdit_file(tmp_path / "broken.safetensors", tmp_path / "dit")


@torch.no_grad()
@pytest.mark.parametrize("path", parity_cases("davae_ldm", having="reconstruction"))
def test_the_imagenet_autoencoder_by_file(path: Path, tmp_path: Path) -> None:
    case = load_case(path)
    torch.save({"state_dict": case.state_dict()}, tmp_path / "file.ckpt")
    made = convert_imagenet_file(tmp_path / "file.ckpt", tmp_path / "davae")
    assert made.kind.startswith("AutoencoderDA f")
    opened = AutoencoderDA.from_pretrained(tmp_path / "davae")
    latent = opened.encode(case.tensors["image"]).latent_dist.mode()
    assert relative_error(opened.decode(latent).sample, case.tensors["reconstruction"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("path", parity_cases("davae_sd3", having="reconstruction"))
def test_the_sd3_autoencoder_by_file(path: Path, tmp_path: Path) -> None:
    case = load_case(path)
    base = AutoencoderKL(**case.info["config"]["vae"])
    base.load_state_dict({**base.state_dict(), **case.state_dict("original_vae_model.vae.")})
    base.save_pretrained(tmp_path / "pipeline" / "vae")
    save_file(case.state_dict(), tmp_path / "file.safetensors")
    convert_sd3_file(tmp_path / "file.safetensors", tmp_path / "davae", base=tmp_path / "pipeline")
    opened = AutoencoderDA.from_pretrained(tmp_path / "davae")
    images = case.tensors["image"] * 2 - 1
    decoded = opened.decode(opened.encode(images).latent_dist.mode()).sample
    assert relative_error(((decoded + 1) / 2).clamp(0, 1), case.tensors["reconstruction"]) < 1e-5
    with pytest.raises(DavaeError, match="holds no autoencoder"):
        convert_sd3_file(tmp_path / "file.safetensors", tmp_path / "more", base=tmp_path / "nothing")


#: Millions of parameters with RoPE, SwiGLU, RMSNorm, 32 channels and 1000 classes; XL's is published as 675M.
MILLIONS = {"S": 33, "B": 131, "L": 458, "XL": 675, "1p0B": 1030, "1p6B": 1636}


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("patch", [1, 2])
def test_named_sizes_on_the_meta_device(name: str, patch: int) -> None:
    with torch.device("meta"):
        model = LightningDiTTransformer2DModel(
            **SIZES[name], sample_size=16, patch_size=patch, in_channels=32, num_classes=1000
        )
    assert size_name(model.config) == f"{name}/{patch}"
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(MILLIONS[name], rel=0.01)
    if (name, patch) == ("XL", 1):
        assert count == 674_961_824


def test_the_verb_tells_mistakes_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["davae", "convert", "vavae", str(tmp_path / "no.pt"), "--out", str(tmp_path / "o")]
    monkeypatch.setattr(sys, "argv", asked)
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert "there is no file" in told
    assert "Traceback" not in told
