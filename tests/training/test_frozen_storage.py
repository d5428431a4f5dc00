"""Frozen weights of stage 2 in 8 or 4 bits, and in main memory while their block rests."""

import shutil
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.bases.debug_pipelines import base_resolution, small_pipeline
from davae.data import collate, open_dataset
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.quantization import quantizable_layers, quantized_bytes
from davae.pipelines.saving.opening import load_pipeline
from davae.recipes.read import load_recipe
from davae.training.diffusion import DiffusionStage
from davae.training.diffusion.inputs import prepare_inputs
from davae.training.engine.offload import BlockOffload, RestingParameter
from davae.training.loop.rng import _seed_step
from davae.training.runs.train import run_autoencoder, run_diffusion
from davae.warm_start import channel_parameters

LORA = [
    "diffusion.tune.mode=lora",
    "diffusion.tune.frozen_dtype=bfloat16",
    "diffusion.loop.precision=bf16",
    "diffusion.loop.validation_images=1",
]
FAMILIES = ("sd3", "flux")


@dataclass
class Step:
    """A stage after one forward and backward."""

    stage: DiffusionStage
    loss: float
    gradients: dict[str, Tensor]
    offload: Any = field(default=None)


class Counted(BlockOffload):
    """Weights at rest hold no numbers, and the bytes of their copies are counted."""

    def __init__(self, transformer: nn.Module, device: torch.device) -> None:
        self.live = self.peak = 0
        self.true: dict[int, Tensor] = {}
        super().__init__(transformer, device)
        for _, _, parameter in self._resting:
            self.true[id(parameter)] = parameter.data.clone()
            parameter.data.fill_(float("nan"))

    def copy(self, parameter: RestingParameter) -> Tensor:
        made = self.true[id(parameter)].clone()
        size = made.untyped_storage().nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(made.untyped_storage(), self._forget, size)
        return made

    def _forget(self, size: int) -> None:
        self.live -= size


def step(name: str, *more: str, counted: bool = False) -> Step:
    recipe = load_recipe("debug-text", [*LORA, *more])
    base = small_pipeline(name)
    base.transformer.to(torch.bfloat16)
    torch.manual_seed(0)
    pipe = upgrade_pipeline(base, AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8))
    side = 2 * base_resolution(name)
    parts = (
        open_dataset("procedural:4", resolution=side),
        open_dataset("procedural", resolution=side, hold_out=2, part="held_out"),
    )
    torch.manual_seed(1)
    inputs = prepare_inputs(pipe, pipe.vae, recipe.diffusion, *parts)
    torch.manual_seed(2)
    stage = DiffusionStage(pipe, pipe.vae.layout, recipe.diffusion, inputs)
    torch.manual_seed(3)
    for parameter_name, parameter in pipe.transformer.named_parameters():
        if "lora_B" in parameter_name:  # zero at the start, where A has no gradient
            parameter.data.normal_(std=0.05)
    offload = Counted(pipe.transformer, torch.device("cpu")) if counted else None
    batch = {k: v for k, v in collate([inputs.dataset[i] for i in range(2)]).items() if k != "skipped"}
    stage.objective.train()
    _seed_step(0, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = stage.objective(batch, 0)["total"]
    loss.backward()
    found = {n: p.grad for n, p in stage.objective.named_parameters() if p.grad is not None}
    return Step(stage, float(loss), found, offload)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_at_rest_change_no_number(name: str, checkpointing: str) -> None:
    """Losses and gradients are bit-equal although weights at rest are NaN, and copies of one block alone are alive."""
    key = f"diffusion.loop.gradient_checkpointing={checkpointing}"
    plain, resting = step(name, key), step(name, key, counted=True)
    assert resting.loss == plain.loss
    assert resting.gradients.keys() == plain.gradients.keys()
    assert all(torch.equal(resting.gradients[n], g) for n, g in plain.gradients.items())
    counted = resting.offload
    whole = sum(parameter.nbytes for _, _, parameter in counted._resting)
    assert counted.live == 0
    assert 0 < counted.peak < whole


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_on_quantised_weights_is_near_the_one_in_bfloat16(name: str, quantization: str) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for checkpointing in ("true", "false"):
        key = f"diffusion.loop.gradient_checkpointing={checkpointing}"
        plain, ours = step(name, key), step(name, key, f"diffusion.tune.quantization={quantization}")
        assert ours.loss == pytest.approx(plain.loss, rel=0.02)
        assert ours.gradients.keys() == plain.gradients.keys()
        a, b = (torch.cat([one.gradients[n].flatten().float() for n in plain.gradients]) for one in (ours, plain))
        assert torch.cosine_similarity(a, b, dim=0) > {"8bit": 0.97, "4bit": 0.9}[quantization]
    transformer = ours.stage.pipeline.transformer
    widened = {name.rpartition(".")[0] for name in channel_parameters(transformer)}
    kinds = {n: type(m).__name__ for n, m in transformer.named_modules()}
    assert all("bit" not in kinds[name] for name in widened)
    saved = ours.stage.objective.state_dict()
    learns = {n for n, p in ours.stage.objective.named_parameters() if p.requires_grad}
    assert learns
    assert all(saved[n].dtype == torch.float32 for n in learns)


def test_the_plan_knows_the_bytes_of_quantised_layers() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    for quantization in ("8bit", "4bit"):
        transformer = step("sd3", f"diffusion.tune.quantization={quantization}").stage.pipeline.transformer
        plain = small_pipeline("sd3").transformer
        for name in quantizable_layers(plain)[:4]:
            layer = transformer.get_submodule(name)
            layer = getattr(layer, "base_layer", layer)
            assert isinstance(layer.weight, (bnb.nn.Int8Params, bnb.nn.Params4bit))
            scales = layer.state.SCB if quantization == "8bit" else layer.weight.quant_state.absmax
            size = layer.weight.nbytes + scales.nbytes
            assert size == quantized_bytes(plain.get_submodule(name), quantization)


@pytest.mark.parametrize(
    ("keys", "advice"),
    [
        (["diffusion.tune.quantization=8bit", "diffusion.tune.offload_blocks=true"], "set one of them"),
        (["diffusion.tune.quantization=4bit", "diffusion.tune.frozen_dtype=float32"], "needs tune.frozen_dtype"),
        (["diffusion.tune.offload_blocks=true", "diffusion.loop.compile=true"], "set loop.compile=false"),
        (["diffusion.tune.offload_blocks=true", "diffusion.tune.mode=full"], "set tune.mode=lora"),
    ],
)
def test_what_does_not_go_together_is_told_before_any_work(keys: list[str], advice: str) -> None:
    off = [] if "diffusion.tune.mode=full" not in keys else ["diffusion.tune.frozen_dtype=float32"]
    with pytest.raises(DavaeError, match=advice):
        load_recipe("debug-text", [*LORA, *keys, *off])


@pytest.mark.parametrize("storage", ["quantization=8bit", "quantization=4bit", "offload_blocks=true"])
def test_a_run_continues_and_its_result_has_the_base_s_own_weights(tmp_path: Path, storage: str) -> None:
    if storage.startswith("quantization"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quick = ["data.path=procedural:8", "data.hold_out=2", "autoencoder.loop.steps=1", "diffusion.loop.steps=2"]
    quick += ["diffusion.loop.checkpoint_every=1", *LORA]
    vae = tmp_path / "vae"
    run_autoencoder("debug-text", quick, vae)
    stored = [*quick, f"diffusion.tune.{storage}"]
    one, two, plain = tmp_path / "one", tmp_path / "two", tmp_path / "plain"
    run_diffusion("debug-text", stored, one, autoencoder=vae / "autoencoder")
    shutil.copytree(one, two)
    for made in ("checkpoints/step-2", "pipeline", "adapters"):
        shutil.rmtree(two / made)
    run_diffusion("debug-text", stored, two, autoencoder=vae / "autoencoder")
    run_diffusion("debug-text", quick, plain, autoencoder=vae / "autoencoder")
    ours, again, theirs = (load_pipeline(run / "pipeline").transformer.state_dict() for run in (one, two, plain))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], again[n]) for n in ours)
    assert [n for n, t in theirs.items() if (ours[n].float() - t.float()).abs().max() > 0.02] == []
    learns = {n.partition(".")[0] for n in load_file(one / "checkpoints" / "step-2" / "model.safetensors")}
    assert learns == {"transformer"}
    assert (one / "checkpoints/step-2/model.safetensors").stat().st_size == (
        plain / "checkpoints/step-2/model.safetensors"
    ).stat().st_size
