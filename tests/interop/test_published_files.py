"""Every verb of `davae convert` on every form of file, and on files with a fault: the message names file and key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from tests.interop.test_conversion import LATENT, WIDTHS, ldm_names
from tests.interop.test_official_lightningdit import official
from torch import Tensor

from davae.errors import DavaeError
from davae.interop.conversion import (
    Converted,
    convert_imagenet_file,
    convert_lightningdit_file,
    convert_sd3_file,
    convert_vavae_file,
)
from davae.models import AutoencoderDA

FEATURES = 64  # of the encoders' last level


@dataclass
class Published:
    """One kind of file.

    Attributes:
        state: official names.
        convert: file and folder.
        key: one of the names.
        ours: the same in the model.
    """

    state: dict[str, Tensor]
    convert: Callable[[Path, Path], Converted]
    key: str
    ours: str


def kl(**options: object) -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=LATENT,
        layers_per_block=1,
        **options,  # type: ignore[arg-type]
    ).eval()


def new_blocks(down: str, up: str, decoder_input: int) -> dict[str, Tensor]:
    """Down to 2 + 2 statistics of two detail channels a position, up to four positions' features."""
    return {
        f"{down}.conv.weight": torch.randn(2 * LATENT // 4, FEATURES, 3, 3),
        f"{down}.conv.bias": torch.randn(2 * LATENT // 4),
        f"{up}.conv.weight": torch.randn(4 * FEATURES, decoder_input, 3, 3),
        f"{up}.conv.bias": torch.randn(4 * FEATURES),
    }


def lightningdit(folder: Path) -> Published:
    key = "blocks.0.attn.proj.weight"
    return Published(official(), convert_lightningdit_file, key, "transformer_blocks.0.attn.to_out.0.weight")


def vavae(folder: Path) -> Published:
    key = "encoder.down.0.block.0.conv2.bias"
    return Published(ldm_names(kl()), convert_vavae_file, key, "encoder.down_blocks.0.resnets.0.conv2.bias")


def davae_imagenet(folder: Path) -> Published:
    parts = {
        "encoder.": ("base_encoder.", "da.encoder."),
        "decoder.": ("da.decoder.",),
        "quant_conv.": ("base_quant_conv.",),
    }
    state = {
        new + name.removeprefix(old): tensor.clone()
        for name, tensor in ldm_names(kl()).items()
        for old, news in parts.items()
        if name.startswith(old)
        for new in news
    }
    state |= new_blocks("da.da_down", "da.da_up", 2 * LATENT)
    key = "da.decoder.mid.block_1.conv1.weight"
    return Published(state, convert_imagenet_file, key, "joint_decoder.mid_block.resnets.0.conv1.weight")


def davae_sd3(folder: Path) -> Published:
    base = kl(use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5, shift_factor=0.1)
    base.save_pretrained(folder / "base")
    weights = base.state_dict()
    state = {f"vae.{name}": tensor for name, tensor in weights.items()}
    state |= {f"original_vae_model.vae.{n}": t.clone() for n, t in weights.items() if n.startswith("encoder.")}
    state |= new_blocks("dc_down", "dc_up", 2 * LATENT)
    key = "vae.decoder.mid_block.resnets.0.conv1.weight"
    return Published(
        state,
        lambda file, out: convert_sd3_file(file, out, base=folder / "base"),
        key,
        "joint_decoder.mid_block.resnets.0.conv1.weight",
    )


KINDS = pytest.mark.parametrize("kind", [lightningdit, vavae, davae_imagenet, davae_sd3])


@KINDS
@pytest.mark.parametrize("form", ["bare.safetensors", "bare.pt", "ema.pt", "state_dict.ckpt", "module.pt"])
def test_every_form_of_file_gives_the_same_folder(kind: Callable[[Path], Published], form: str, tmp_path: Path) -> None:
    case = kind(tmp_path)
    file = tmp_path / form
    if form == "bare.safetensors":
        save_file(case.state, file)
    else:
        other = {name: tensor + 1 for name, tensor in case.state.items()}
        content = {
            "bare.pt": case.state,
            "ema.pt": {"model": other, "ema": case.state, "step": 3},
            "state_dict.ckpt": {"state_dict": case.state, "epoch": 1},
            "module.pt": {"model": {f"module._orig_mod.{n}": t for n, t in case.state.items()}},
        }[form]
        torch.save(content, file)
    made = case.convert(file, tmp_path / "out")
    (weights,) = made.out.glob("*.safetensors")
    assert torch.equal(load_file(weights)[case.ours], case.state[case.key])


@KINDS
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"file\.pt: .*missing: {ours} \(missing ones by their names in the diffusers model\)"),
        ("unexpected", r"file\.pt: .*unexpected: .*stranger\.weight"),
        ("size", r"file\.pt: .*of another shape: {ours} \(7, 7\), expected \("),
        ("empty", r"file\.pt holds nothing; expected named tensors"),
        ("something else", r"file\.pt: .*missing: "),
        ("no tensors", r"file\.pt holds epoch; expected named tensors"),
        ("damaged", r"file\.pt cannot be read: it is damaged"),
        ("absent", r"there is no file .*file\.pt"),
    ],
)
def test_a_fault_is_told_with_file_and_key(
    kind: Callable[[Path], Published], fault: str, message: str, tmp_path: Path
) -> None:
    case = kind(tmp_path)
    state, file = dict(case.state), tmp_path / "file.pt"
    if fault == "missing":
        del state[case.key]
    elif fault == "unexpected":
        state["stranger.weight"] = torch.zeros(1)
    elif fault == "size":
        state[case.key] = torch.zeros(7, 7)
    elif fault == "empty":
        state = {}
    elif fault == "something else":
        state = {"classifier.weight": torch.zeros(2, 2)}
    torch.save({"epoch": 3} if fault == "no tensors" else state, file)
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:100])
    elif fault == "absent":
        file.unlink()
    with pytest.raises(DavaeError, match=message.format(ours=case.ours.replace(".", r"\."))):
        case.convert(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_names_of_a_long_list_are_cut(tmp_path: Path) -> None:
    state = official() | {f"stranger.{number}": torch.zeros(1) for number in range(30)}
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(DavaeError, match=r"unexpected: stranger\.0, .* and 10 more"):
        convert_lightningdit_file(tmp_path / "file.pt", tmp_path / "out")


def test_statistics_of_other_channels(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"mean": [0, 0], "std": [1, 1]}')
    for kind, words in ((vavae, "the latent has 4"), (davae_imagenet, "the latent has 8")):
        case = kind(tmp_path)
        torch.save(case.state, tmp_path / "file.pt")
        convert = convert_vavae_file if kind is vavae else convert_imagenet_file
        with pytest.raises(DavaeError, match=rf"file\.pt: there are 2 means and 2 deviations, but {words}"):
            convert(tmp_path / "file.pt", tmp_path / "out", statistics=tmp_path / "s.json")


def test_a_folder_that_was_made_is_a_working_autoencoder(tmp_path: Path) -> None:
    case = davae_imagenet(tmp_path)
    torch.save(case.state, tmp_path / "file.pt")
    case.convert(tmp_path / "file.pt", tmp_path / "out")
    model = AutoencoderDA.from_pretrained(tmp_path / "out")
    image = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        latent = model.encode(image).latent_dist.mode()
        assert latent.shape == (1, 2 * LATENT, 4, 4)
        assert model.decode(latent).sample.shape == image.shape
    with pytest.raises(DavaeError, match="18"):
        model.encode(torch.zeros(1, 3, 18, 16))
