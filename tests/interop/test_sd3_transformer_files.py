"""`davae convert davae-sd3` with the tuned transformer: every form of file, every key, and a pipeline that works."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from tests.conftest import load_case, parity_cases, relative_error
from tests.parity.test_warm_start import layout_of, official_weights, original, predict, to_official_order
from torch import Tensor
from typer.testing import CliRunner

from davae.bases.debug_pipelines import small_pipeline
from davae.cli.main import app
from davae.errors import DavaeError
from davae.interop.conversion import convert_sd3_file
from davae.interop.official_sd3_transformer import from_official_order, to_official
from davae.latents import LatentLayout
from davae.models import AutoencoderDA
from davae.pipelines import load_pipeline, upgrade_pipeline

LAYOUT = LatentLayout(4, 4)
LAYER = "transformer_blocks.0.attn.to_q"


class Upgraded:
    """A small SD3 pipeline, upgraded, with new weights that are not zero, and its folders."""

    def __init__(self, folder: Path) -> None:
        base = small_pipeline("sd3")
        self.base, self.vae = folder / "base", folder / "vae"
        base.save_pretrained(self.base)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            autoencoder = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=LAYOUT.detail_channels)
            autoencoder.save_pretrained(self.vae)
            self.pipe = upgrade_pipeline(base, autoencoder.eval())
            for layer in (self.pipe.transformer.pos_embed.proj, self.pipe.transformer.proj_out):
                torch.nn.init.normal_(layer.weight, std=0.1)
        self.state = {name: t.clone() for name, t in self.pipe.transformer.state_dict().items()}
        self.official = to_official(self.state, LAYOUT)

    def trained(self) -> dict[str, Tensor]:
        """What the authors' checkpoints hold: patch embedder and head, under their names."""
        return {
            name.replace("pos_embed.", "tokenizer_patch_embed.").replace("proj_out.", "project_out."): tensor
            for name, tensor in self.official.items()
            if name.startswith(("pos_embed.", "proj_out."))
        }

    def lora(self, ending: str = "") -> dict[str, Tensor]:
        """A LoRA of one layer, rank 2."""
        width = len(self.state[f"{LAYER}.weight"])
        torch.manual_seed(2)
        return {
            f"transformer.{LAYER}.lora_A{ending}.weight": torch.randn(2, width),
            f"transformer.{LAYER}.lora_B{ending}.weight": torch.randn(width, 2),
        }

    def with_lora(self) -> Tensor:
        a, b = self.lora().values()
        return self.state[f"{LAYER}.weight"] + b @ a


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> Upgraded:
    return Upgraded(tmp_path_factory.mktemp("sd3"))


def convert(file: Path, content: dict[str, object], upgraded: Upgraded, **options: object) -> SD3Transformer2DModel:
    """Write a file, convert it beside itself, and open the folder with diffusers."""
    save_file(content, file) if file.suffix == ".safetensors" else torch.save(content, file)  # type: ignore[arg-type]
    made = convert_sd3_file(file, file.with_suffix(""), base=upgraded.base, **options)  # type: ignore[arg-type]
    assert made.kind == "SD3Transformer2DModel, 4 + 4 channels"
    return SD3Transformer2DModel.from_pretrained(made.out)


def assert_equal(model: SD3Transformer2DModel, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert not [name for name in state if not torch.allclose(state[name], expected[name], atol=1e-6)]


@torch.no_grad()
@pytest.mark.parametrize("path", parity_cases("sd3_warm_start", having="original_output"))
def test_the_authors_outputs_in_their_order(path: Path, tmp_path: Path) -> None:
    case = load_case(path)
    original(case).save_pretrained(tmp_path / "base")
    save_file({f"module.{n}": t for n, t in official_weights(case).items()}, tmp_path / "file.safetensors")
    convert_sd3_file(tmp_path / "file.safetensors", tmp_path / "out", base=tmp_path / "base")
    model = SD3Transformer2DModel.from_pretrained(tmp_path / "out")
    layout = layout_of(case)
    latent = from_official_order(case.tensors["reverse.input"], layout, "detail_first")
    output = to_official_order(predict(model, case, latent), layout, "detail_first")
    assert relative_error(output, case.tensors["reverse.random_extra_output"]) < 1e-5


@pytest.mark.parametrize("form", ["bare.safetensors", "model.pt", "state_dict.ckpt", "wrapped.pt"])
def test_a_whole_transformer(form: str, upgraded: Upgraded, tmp_path: Path) -> None:
    official = upgraded.official
    content = {
        "bare.safetensors": official,
        "model.pt": {"model": {f"transformer.{n}": t for n, t in official.items()}, "step": 3},
        "state_dict.ckpt": {"state_dict": {f"module.transformer.transformer.{n}": t for n, t in official.items()}},
        "wrapped.pt": {f"_orig_mod.{n}": t for n, t in official.items()},
    }[form]
    assert_equal(convert(tmp_path / form, content, upgraded), upgraded.state)


@torch.no_grad()
@pytest.mark.parametrize("order", ["detail_first", "base_first"])
def test_plain_wider_layers_are_reordered(order: str, upgraded: Upgraded, tmp_path: Path) -> None:
    """Written out by hand: channel by channel at each of the p * p positions."""
    places = [4, 5, 6, 7, 0, 1, 2, 3] if order == "detail_first" else list(range(8))  # theirs -> ours
    state = dict(upgraded.state)
    state["pos_embed.proj.weight"] = state["pos_embed.proj.weight"][:, places]
    for kind in ("weight", "bias"):
        rows = [position * 8 + place for position in range(4) for place in places]
        state[f"proj_out.{kind}"] = state[f"proj_out.{kind}"][rows]
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    assert_equal(convert(tmp_path / "plain.safetensors", state, upgraded, order=order), upgraded.state)


def test_the_trained_weights_alone_with_a_lora_beside(
    upgraded: Upgraded, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = upgraded.state | {f"{LAYER}.weight": upgraded.with_lora()}
    save_file(upgraded.lora(), tmp_path / "lora.safetensors")
    content = {"global_step": 3, "model_state_dict": upgraded.trained()}
    made = convert(tmp_path / "step.pt", content, upgraded, lora=tmp_path / "lora.safetensors")
    assert_equal(made, expected)
    with caplog.at_level(logging.WARNING, "davae"):
        assert_equal(convert(tmp_path / "again.pt", content, upgraded), upgraded.state)
    assert "no LoRA: the transformer's blocks are taken unchanged" in caplog.text


def test_the_base_s_other_files_are_not_mixed_in(upgraded: Upgraded, tmp_path: Path) -> None:
    """A variant beside the weights, and one that is not finite."""
    shutil.copytree(upgraded.base, tmp_path / "base")
    weights = tmp_path / "base" / "transformer" / "diffusion_pytorch_model.safetensors"
    half = {name: (tensor + 1).half() for name, tensor in load_file(weights).items()}
    save_file(half, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    torch.save({"model_state_dict": upgraded.trained()}, tmp_path / "file.pt")
    made = [tmp_path / "beside", tmp_path / "alone"]
    for out, base in zip(made, (tmp_path / "base", upgraded.base), strict=True):
        convert_sd3_file(tmp_path / "file.pt", out, base=base)
    states = [SD3Transformer2DModel.from_pretrained(out).state_dict() for out in made]
    for name, tensor in states[1].items():
        assert torch.equal(states[0][name], tensor)
    broken = load_file(weights)
    name = next(name for name in broken if name.startswith("transformer_blocks"))
    broken[name].view(-1)[0] = math.inf
    save_file(broken, weights)
    with pytest.raises(DavaeError, match=f"{name} holds numbers that are not finite"):
        convert_sd3_file(tmp_path / "file.pt", tmp_path / "never", base=tmp_path / "base")


def test_running_means_hold_the_lora_and_come_first(upgraded: Upgraded, tmp_path: Path) -> None:
    means = {f"transformer.transformer.{n}": t for n, t in upgraded.official.items() if n.startswith("p")}
    means |= {f"transformer.{n}": t for n, t in upgraded.lora(".default").items()}
    other = {name: tensor + 1 for name, tensor in upgraded.trained().items() if "pos_embed.pos" not in name}
    content = {"model_state_dict": other, "ema_state_dict": means}
    expected = upgraded.state | {f"{LAYER}.weight": upgraded.with_lora()}
    assert_equal(convert(tmp_path / "step.pt", content, upgraded), expected)
    made = convert(tmp_path / "model.pt", content, upgraded, weights="model")
    assert torch.equal(made.proj_out.bias, upgraded.state["proj_out.bias"] + 1)


@torch.no_grad()
def test_the_whole_pipeline_opens_and_paints_as_the_upgraded_one(upgraded: Upgraded, tmp_path: Path) -> None:
    save_file(upgraded.official, tmp_path / "file.safetensors")
    done = CliRunner().invoke(
        app,
        [
            *("convert", "davae-sd3", str(tmp_path / "file.safetensors"), "--base", str(upgraded.base)),
            *("--vae", str(upgraded.vae), "--out", str(tmp_path / "pipe")),
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    assert "SD3Transformer2DModel, 4 + 4 channels" in done.output
    pipe = load_pipeline(tmp_path / "pipe")
    assert isinstance(pipe, StableDiffusion3Pipeline)
    assert pipe.scheduler.config.shift == 4
    pipe.set_progress_bar_config(disable=True)
    expected = upgraded.pipe
    expected.scheduler = type(expected.scheduler).from_config(expected.scheduler.config, shift=4.0)
    images = [
        p(
            "a hat",
            height=64,
            width=64,
            num_inference_steps=2,
            output_type="pt",
            generator=torch.Generator().manual_seed(0),
        ).images
        for p in (pipe, expected)
    ]
    assert images[0].shape == (1, 3, 64, 64)
    torch.testing.assert_close(*images)


def faulty(upgraded: Upgraded, fault: str) -> dict[str, Tensor]:
    state = dict(upgraded.official)
    if fault == "missing":
        del state[f"{LAYER}.weight"]
    elif fault == "missing branch":
        del state["proj_out.extra_linear.bias"]
    elif fault == "unexpected":
        state["stranger.weight"] = torch.zeros(1)
    elif fault == "wrong size":
        state[f"{LAYER}.weight"] = torch.zeros(3, 5)
    elif fault == "twice":
        state["project_out.base_linear.bias"] = state["proj_out.base_linear.bias"] + 1
    elif fault == "half a LoRA":
        state[f"{LAYER}.lora_A.weight"] = torch.zeros(2, 2)
    elif fault == "LoRA of another size":
        state |= {f"{LAYER}.lora_A.weight": torch.zeros(2, 3), f"{LAYER}.lora_B.weight": torch.zeros(3, 2)}
    elif fault == "LoRA of nothing":
        state |= {"other.lora_A.weight": torch.zeros(2, 3), "other.lora_B.weight": torch.zeros(3, 2)}
    return state


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", rf"file\.pt: .*missing: {LAYER}\.weight"),
        ("missing branch", r"file\.pt: .*missing: proj_out\.extra_linear\.bias"),
        ("unexpected", r"file\.pt: .*unexpected: stranger\.weight"),
        ("wrong size", rf"file\.pt: .*other shapes: {LAYER}\.weight \(3, 5\), expected"),
        ("twice", r"file\.pt: 'proj_out\.base_linear\.bias' is there twice"),
        ("half a LoRA", rf"file\.pt: .*missing: {LAYER}\.lora_B\.weight"),
        ("LoRA of another size", rf"file\.pt: the LoRA of '{LAYER}' has matrices"),
        ("LoRA of nothing", r"file\.pt: the LoRA adapts 'other', which"),
    ],
)
def test_a_fault_is_told_with_file_and_key(fault: str, message: str, upgraded: Upgraded, tmp_path: Path) -> None:
    torch.save(faulty(upgraded, fault), tmp_path / "file.pt")
    with pytest.raises(DavaeError, match=message):
        convert_sd3_file(tmp_path / "file.pt", tmp_path / "out", base=upgraded.base)
    assert not (tmp_path / "out").exists()


def test_parts_that_do_not_fit(upgraded: Upgraded, tmp_path: Path) -> None:
    file, lora, out = tmp_path / "file.pt", tmp_path / "lora.pt", tmp_path / "out"
    torch.save(upgraded.official, file)
    torch.save({"stranger": torch.zeros(1)}, lora)
    with pytest.raises(DavaeError, match=r"lora\.pt: this is not a LoRA\. unexpected: stranger"):
        convert_sd3_file(file, out, base=upgraded.base, lora=lora)
    with pytest.raises(DavaeError, match=r"holds no transformer: there is no config\.json"):
        convert_sd3_file(file, out, base=tmp_path)
    with pytest.raises(DavaeError, match="the statistics belong to the autoencoder"):
        convert_sd3_file(file, out, base=upgraded.base, statistics=file)
    with pytest.raises(DavaeError, match="holds a AutoencoderKL: convert the authors' autoencoder first"):
        convert_sd3_file(file, out, base=upgraded.base, vae=upgraded.base)
    base = small_pipeline("sd3")
    other = AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(DavaeError, match=r"the transformer has 4 \+ 4 channels, the autoencoder of .* 4 \+ 8"):
        convert_sd3_file(file, out, base=upgraded.base, vae=tmp_path / "other")
    base.transformer.save_pretrained(tmp_path / "narrow")
    with pytest.raises(DavaeError, match="takes 4 channels, the base 4: this transformer was not widened"):
        convert_sd3_file(tmp_path / "narrow" / "diffusion_pytorch_model.safetensors", out, base=upgraded.base)
    torch.save({"model_state_dict": upgraded.trained()}, file)
    (tmp_path / "narrow" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(DavaeError, match=r"contains only the trained weights, and .* has no diffusion_pytorch_model"):
        convert_sd3_file(file, out, base=tmp_path / "narrow")
    torch.save({"dc_down.conv.weight": torch.zeros(1)}, file)
    with pytest.raises(DavaeError, match="is no transformer of SD3: --lora and --vae go with"):
        convert_sd3_file(file, out, base=upgraded.base, lora=lora)
