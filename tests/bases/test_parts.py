"""Parts of a base are opened where they are needed, and only there."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from davae.bases.debug_pipelines import SMALL_PIPELINES, small_pipeline
from davae.bases.open import EVERYTHING, load_base
from davae.bases.upgrade import write_upgraded
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.runtime.devices import saved_dtype


def _saved(name: str, folder: Path) -> Path:
    small_pipeline(name).save_pretrained(folder)
    return folder


def _without_weights(folder: Path, *parts: str) -> None:
    for part in parts:
        files = list((folder / part).glob("*.safetensors"))
        assert files
        for file in files:
            file.unlink()


@pytest.mark.parametrize("name", [name for name in SMALL_PIPELINES if name != "dit"])
def test_what_is_left_out_is_not_read(name: str, tmp_path: Path) -> None:
    folder = _saved(name, tmp_path / "base")
    encoders = [part.name for part in folder.iterdir() if part.name.startswith("text_encoder")]
    _without_weights(folder, "vae", "transformer", *encoders)
    outline = load_base(str(folder), without=EVERYTHING)
    assert all(getattr(outline, encoder) is None for encoder in encoders)
    assert {p.device.type for part in (outline.vae, outline.transformer) for p in part.parameters()} == {"meta"}
    assert outline.transformer.config.in_channels == small_pipeline(name).transformer.config.in_channels


def test_one_text_encoder_alone(tmp_path: Path) -> None:
    folder = _saved("sd3", tmp_path / "base")
    _without_weights(folder, "vae", "transformer", "text_encoder", "text_encoder_3")
    found = load_base(str(folder), without=("vae", "transformer", "text_encoder", "text_encoder_3"))
    expected = small_pipeline("sd3").text_encoder_2.state_dict()
    assert found.text_encoder is None
    assert found.text_encoder_3 is None
    assert all(torch.equal(value, expected[key]) for key, value in found.text_encoder_2.state_dict().items())


@pytest.mark.parametrize("copy", [True, False])
def test_a_widened_transformer_may_take_over_the_weights(copy: bool) -> None:
    base = small_pipeline("sd3")
    torch.manual_seed(0)
    vae = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    upgraded = upgrade_pipeline(base, vae, copy=copy)
    places = {p.data_ptr() for p in base.transformer.parameters()}
    shared = {name for name, p in upgraded.transformer.named_parameters() if p.data_ptr() in places}
    widened = {"pos_embed.proj.weight", "proj_out.weight", "proj_out.bias"}
    everything = {name for name, _ in upgraded.transformer.named_parameters()}
    assert shared == (set() if copy else everything - widened)


def test_an_upgrade_keeps_the_precision_of_each_part(tmp_path: Path) -> None:
    base = small_pipeline("sd3")
    base.transformer.to(torch.bfloat16)
    base.text_encoder_3.to(torch.float16)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8).save_pretrained(tmp_path / "vae")
    write_upgraded(str(tmp_path / "base"), tmp_path / "vae", tmp_path / "up")
    found = {
        part: saved_dtype(tmp_path / "up" / part) for part in ("transformer", "vae", "text_encoder", "text_encoder_3")
    }
    assert found == {
        "transformer": torch.bfloat16,
        "vae": torch.float32,
        "text_encoder": torch.float32,
        "text_encoder_3": torch.float16,
    }
    before, after = (json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("base", "up"))
    assert {k: v for k, v in after.items() if k != "vae"} == {k: v for k, v in before.items() if k != "vae"}
    opened = DiffusionPipeline.from_pretrained(tmp_path / "up", dtype=torch.float32)
    wanted = base.text_encoder_3.state_dict()
    assert all(torch.equal(v, wanted[k].float()) for k, v in opened.text_encoder_3.state_dict().items())
    write_upgraded(str(tmp_path / "base"), tmp_path / "vae", tmp_path / "up32", dtype="float32")
    assert saved_dtype(tmp_path / "up32" / "transformer") == torch.float32
