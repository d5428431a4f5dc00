"""Frozen weights of stage 2: what is kept in memory, what is refused, and how quantised runs begin and end."""

import gc
import weakref
from functools import partial

import pytest
import torch
from diffusers.models.modeling_utils import ModelMixin
from safetensors.torch import load_file
from tests.training.test_frozen_storage import LORA, step
from torch import nn

from davae.bases.debug_pipelines import small_pipeline
from davae.bases.open import load_base
from davae.data import collate
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines import upgrade_pipeline
from davae.pipelines.quantization import quantizable_layers, quantize
from davae.pipelines.saving.adapters import load_adapters
from davae.recipes import checks
from davae.recipes.checks import check_settings
from davae.recipes.read import load_recipe
from davae.training.diffusion import train as stage2
from davae.training.engine import offload
from davae.training.engine.offload import BlockOffload, PageLocked, RestingParameter
from davae.training.loop.rng import _seed_step
from davae.training.runs.train import check_upgrade, train_autoencoder, train_diffusion

CPU = torch.device("cpu")
TUNE = "diffusion.tune."


def _widened(name):
    base = small_pipeline(name)
    torch.manual_seed(0)
    return upgrade_pipeline(base, AutoencoderDA.from_base(base.vae, scale=2, detail_channels=8)).transformer.bfloat16()


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_part_of_a_block_that_is_used_outside_of_it(checkpointing):
    """DiT asks its first block for the embedding of time and class."""
    more = f"diffusion.loop.gradient_checkpointing={checkpointing}", f"{TUNE}lora.targets=[to_q,to_v]"
    plain, resting = step("dit", *more), step("dit", *more, counted=True)
    assert resting.loss == plain.loss
    assert all(torch.equal(resting.gradients[n], g) for n, g in plain.gradients.items())


def test_what_rests_stays_where_it_is_until_it_is_ordinary_again():
    transformer = _widened("flux").requires_grad_(False)
    transformer.proj_out.requires_grad_(True)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    blocks = BlockOffload(transformer, CPU)
    transformer.to("meta")
    resting = {name for name, p in transformer.named_parameters() if isinstance(p, RestingParameter)}
    assert resting == {name for name, p in transformer.named_parameters() if p.device == CPU}
    assert resting == {name for name in before if "transformer_blocks." in name}
    blocks.remove()
    assert {type(p) for p in transformer.parameters()} == {nn.Parameter}
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in transformer.modules())
    assert all(torch.equal(transformer.state_dict()[name], before[name]) for name in resting)


def test_page_locked_weights_share_pieces():
    """Locking itself needs a CUDA device."""
    weights = [torch.randn(3, 5), torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last), torch.randn(7).half()]
    memory = PageLocked(sum(w.nbytes for w in weights), lock=False)  # 60 + 288 + 14 bytes, each from a multiple of 64
    moved = [memory.moved(w) for w in weights]
    assert memory.bytes == 512
    assert len({w.untyped_storage().data_ptr() for w in moved}) == 1
    assert [w.stride() for w in moved] == [w.stride() for w in weights]
    assert all(torch.equal(*pair) for pair in zip(weights, moved))
    large = memory.moved(torch.ones(200))
    assert memory.bytes == 512 + 1024  # a piece of its own, rounded up
    assert (large == 1).all()


def test_a_step_with_locked_weights(monkeypatch):
    """The whole way but the locking itself."""
    monkeypatch.setattr(offload, "PageLocked", partial(PageLocked, lock=False))
    transformer = _widened("flux").requires_grad_(False)
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    resting = BlockOffload(transformer, CPU)
    resting.pin = True
    with torch.no_grad():
        transformer.transformer_blocks[0].norm1.linear(torch.zeros(1, 16, dtype=torch.bfloat16))
    assert len({p.untyped_storage().data_ptr() for _, _, p in resting._resting}) < len(resting._resting)
    resting.remove()
    assert all(torch.equal(value, before[name]) for name, value in transformer.state_dict().items())


def test_the_layers_that_learn_or_must_be_exact_stay(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes")
    transformer = _widened("flux")
    monkeypatch.setattr(type(transformer), "_keep_in_fp32_modules", ["context_embedder"])
    linear = {name for name, m in transformer.named_modules() if isinstance(m, nn.Linear)}
    names = quantizable_layers(transformer)
    assert linear - set(names) == {"x_embedder", "proj_out", "context_embedder"}
    assert "single_transformer_blocks.0.proj_out" in names  # named as the output layer is
    weights = [weakref.ref(transformer.get_submodule(name).weight.untyped_storage()) for name in names]
    alive = []
    inner = bnb.nn.Linear4bit.__init__

    def counting(self, *arguments, **options):
        alive.append(sum(weight() is not None for weight in weights))
        inner(self, *arguments, **options)

    monkeypatch.setattr(bnb.nn.Linear4bit, "__init__", counting)
    quantize(transformer, "4bit", CPU)
    assert {name for name, m in transformer.named_modules() if isinstance(m, bnb.nn.Linear4bit)} == set(names)
    assert alive == list(range(len(weights), 0, -1)), "no second copy: a weight is gone before the next is quantised"


@pytest.mark.parametrize("stored", ["8bit", "4bit"])
def test_a_validation_in_between_and_recomputation(stored):
    pytest.importorskip("bitsandbytes")
    one = step("sd3", f"{TUNE}quantization={stored}", "diffusion.loop.gradient_checkpointing=true")
    objective = one.stage.objective
    kept = []
    for block in one.stage.pipeline.transformer.transformer_blocks:
        block.norm1.register_forward_hook(lambda _m, _i, outputs: kept.append(weakref.ref(outputs[0])))
    batch = collate([one.stage.inputs.dataset[i] for i in range(2)])
    batch.pop("skipped", None)
    objective.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        objective(batch, 0)
    objective.train().zero_grad()
    kept.clear()
    _seed_step(0, 0, 0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(batch, 0)["total"]
    gc.collect()
    assert kept
    assert not any(ref() is not None for ref in kept), "a recomputed block keeps nothing between its layers"
    loss.backward()
    assert float(loss) == one.loss
    named = dict(objective.named_parameters())
    assert all(torch.equal(named[n].grad, g) for n, g in one.gradients.items() if named[n].grad is not g)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    recipe = load_recipe("debug-text", ["data.path=procedural:8", "data.hold_out=2", "autoencoder.loop.steps=1"])
    return train_autoencoder(recipe, tmp_path_factory.mktemp("stage1")).result


def _run(folder, out, *overrides, steps=1):
    quick = ["data.path=procedural:8", "data.hold_out=2", f"diffusion.loop.steps={steps}", *LORA]
    return train_diffusion(load_recipe("debug-text", [*quick, *overrides]), out, folder)


def test_a_quantised_run_starts_from_adapters_and_its_adapters_fit_the_base(tmp_path, folder):
    pytest.importorskip("bitsandbytes")
    stored = f"{TUNE}quantization=4bit"
    _run(folder, tmp_path / "first", stored, steps=2)
    slow = ["diffusion.optimizer.learning_rate=1e-9", f"{TUNE}new_channels_learning_rate=1e-9"]
    _run(folder, tmp_path / "second", stored, f"diffusion.start_from={tmp_path / 'first'}", *slow)
    name = "adapters/pytorch_lora_weights.safetensors"
    first, second = (load_file(tmp_path / run / name) for run in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.allclose(first[key], second[key], rtol=1 / 128, atol=1e-6) for key in first)
    assert any(value.abs().max() > 1e-4 for key, value in second.items() if "lora_B" in key)
    load_adapters(load_base("debug-sd3", transformer_dtype=torch.bfloat16), folder, tmp_path / "second" / "adapters")


def test_a_base_that_changed_while_training_is_not_written(tmp_path, folder, monkeypatch):
    pytest.importorskip("bitsandbytes")
    hashed = iter(["as it was", "changed"])
    monkeypatch.setattr(stage2, "weights_hash", lambda part: next(hashed) if isinstance(part, ModelMixin) else "")
    with pytest.raises(DavaeError, match="debug-sd3 has other weights than when training began"):
        _run(folder, tmp_path, f"{TUNE}quantization=8bit")
    assert (tmp_path / "checkpoints" / "step-1").is_dir()
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("option", ["quantization=8bit", "offload_blocks=true"])
def test_fsdp_is_refused(option, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(checks, "_is_installed", lambda package: True)
    with pytest.raises(DavaeError, match=r"does not work with FSDP.*eight-gpus\.yaml"):
        check_upgrade(load_recipe("debug-text", [*LORA, TUNE + option]), "diffusion")


def test_without_bitsandbytes_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(checks, "_is_installed", lambda package: False)
    with pytest.raises(DavaeError, match=r"pip install bitsandbytes.*diffusion\.tune\.quantization=none"):
        check_settings(load_recipe("debug-text", [*LORA, f"{TUNE}quantization=8bit"]), "diffusion")
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(DavaeError, match=r"cannot be imported.*pip install bitsandbytes"):
        quantize(_widened("sd3"), "8bit", CPU)
