"""LoRA and widened layers by themselves: restored in one call, refused on anything else, merged without change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.pipelines.parts import upgraded

import davae
from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments, small_pipeline
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.pipelines import attach_lora, attached_lora, merge_lora
from davae.pipelines.saving.adapters import LORA_FILE, Samples, lora_metadata
from davae.pipelines.saving.opening import LAYERS_FILE

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def pixels(pipe: DiffusionPipeline, name: str) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"class_labels": [3], "num_inference_steps": 2, "output_type": "pt"}
    if name != "classes":
        arguments = call_arguments(name, scale=2)
    return torch.as_tensor(pipe(**arguments, generator=torch.Generator().manual_seed(0), return_dict=False)[0])


def base(name: str, seed: int = 0) -> DiffusionPipeline:
    return debug_base(seed) if name == "classes" else small_pipeline(name, seed)


def tuned(name: str) -> DiffusionPipeline:
    pipe = upgraded(base(name))
    torch.manual_seed(1)
    attach_lora(pipe.transformer, LoraConfig(r=2, lora_alpha=6, target_modules=TARGETS, init_lora_weights=False))
    return pipe


@pytest.mark.parametrize("name", [*SMALL_PIPELINES, "classes"])
def test_saved_and_restored_on_the_base_and_merged(name: str, tmp_path: Path) -> None:
    pipe = tuned(name)
    before = pixels(pipe, name)
    davae.save_adapters(pipe, tmp_path)
    fresh = base(name)
    again = davae.load_adapters(fresh, pipe.vae, tmp_path)
    torch.testing.assert_close(pixels(again, name), before, rtol=0, atol=1e-6)
    assert attached_lora(fresh.transformer) is None, "the base is left as it was"
    (_, saved), (_, restored) = attached_lora(pipe.transformer), attached_lora(again.transformer)
    assert (restored.r, restored.lora_alpha) == (saved.r, saved.lora_alpha) == (2, 6)

    merge_lora(pipe.transformer)
    assert not any("lora" in key or "base_layer" in key for key in pipe.transformer.state_dict())
    torch.testing.assert_close(pixels(pipe, name), before, rtol=0, atol=2e-5)
    assert (before - pixels(upgraded(fresh), name)).abs().max() > 1e-3, "the LoRA does something"


def test_the_files_say_what_they_are(tmp_path: Path) -> None:
    pipe = tuned("sd3")
    davae.save_adapters(pipe, tmp_path)
    with safe_open(tmp_path / LORA_FILE, framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
        assert metadata["transformer.r"] == 2
        assert all(key.startswith("transformer.") and ".lora_" in key for key in file.keys())  # noqa: SIM118
    with safe_open(tmp_path / LAYERS_FILE, framework="pt") as file:
        header = json.loads(file.metadata()["davae"])
    assert header["transformer"] == "SD3Transformer2DModel"
    assert (header["base_channels"], header["detail_channels"], header["scale"]) == (4, 4, 2)
    assert header["layers"] == ["pos_embed.proj.weight", "proj_out.bias", "proj_out.weight"]
    layers = load_file(tmp_path / LAYERS_FILE)
    assert layers["transformer.pos_embed.proj.weight"].shape[1] == 8
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 200_000


def test_the_lora_file_says_what_differs_from_the_defaults_alone(tmp_path: Path) -> None:
    """Versions of peft hand every entry to their own LoraConfig, and older ones do not know the newer entries."""
    for name in ("sd3", "pixart-sigma"):
        davae.save_adapters(tuned(name), tmp_path / name)
        with safe_open(tmp_path / name / LORA_FILE, framework="pt") as file:
            said = json.loads(file.metadata()["lora_adapter_metadata"])
        expected = {"r": 2, "lora_alpha": 6, "target_modules": sorted(TARGETS), "init_lora_weights": False}
        assert {key.removeprefix("transformer."): value for key, value in said.items()} == expected
    config = LoraConfig(target_modules=["to_q"], use_dora=True, rank_pattern={"to_q": 4}, base_model_name_or_path="x")
    assert lora_metadata(config) == {
        "r": 8,
        "lora_alpha": 8,
        "target_modules": ["to_q"],
        "use_dora": True,
        "rank_pattern": {"to_q": 4},
    }


def test_diffusers_reads_the_lora_file_itself(tmp_path: Path) -> None:
    pipe = tuned("sd3")
    before = pixels(pipe, "sd3")
    davae.save_adapters(pipe, tmp_path)
    merged = upgraded(base("sd3"))  # the same widened layers
    merged.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    torch.testing.assert_close(pixels(merged, "sd3"), before, rtol=0, atol=1e-6)


def test_lora_on_the_widened_layers_themselves(tmp_path: Path) -> None:
    pipe = upgraded(base("sd3"))
    attach_lora(pipe.transformer, LoraConfig(r=2, target_modules=["to_q", "proj_out"], init_lora_weights=False))
    before = pixels(pipe, "sd3")
    davae.save_adapters(pipe, tmp_path)
    again = davae.load_adapters(base("sd3"), pipe.vae, tmp_path)
    torch.testing.assert_close(pixels(again, "sd3"), before, rtol=0, atol=1e-6)


def test_widened_layers_alone_and_the_scheduler_come_back(tmp_path: Path) -> None:
    pipe = upgraded(base("classes"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=2.5)
    davae.save_adapters(pipe, tmp_path)
    assert not (tmp_path / LORA_FILE).exists()
    pipe.vae.save_pretrained(tmp_path / "autoencoder")
    again = davae.load_adapters(base("classes"), tmp_path / "autoencoder", tmp_path)
    assert again.scheduler.config.shift == 2.5
    torch.testing.assert_close(pixels(again, "classes"), pixels(pipe, "classes"), rtol=0, atol=1e-6)


def test_another_base_autoencoder_or_size_is_refused_and_named(tmp_path: Path) -> None:
    pipe = tuned("classes")
    davae.save_adapters(pipe, tmp_path)
    other = base("classes")
    with torch.no_grad():
        for parameter in other.transformer.time_embed.parameters():
            parameter.mul_(1.001)
    with pytest.raises(DavaeError, match=r"tuned with another base's transformer: '.*' has other values"):
        davae.load_adapters(other, pipe.vae, tmp_path)
    vae = davae.AutoencoderDA.from_base(base("classes").vae, scale=2, detail_channels=4)
    with pytest.raises(DavaeError, match="tuned with another autoencoder: "):
        davae.load_adapters(base("classes"), retrained(vae), tmp_path)
    vae = davae.AutoencoderDA.from_base(base("classes").vae, scale=2, detail_channels=8)
    with pytest.raises(DavaeError, match="detail channels are 8, not 4"):
        davae.load_adapters(base("classes"), vae, tmp_path)
    with pytest.raises(DavaeError, match="transformer is a SD3Transformer2DModel, not LightningDiT"):
        davae.load_adapters(base("sd3"), vae, tmp_path)


def retrained(vae: davae.AutoencoderDA) -> davae.AutoencoderDA:
    with torch.no_grad():
        vae.up.conv.weight += 0.01
    return vae


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pipe = tuned("classes")
    with pytest.raises(DavaeError, match=f"{LAYERS_FILE} does not exist"):
        davae.load_adapters(base("classes"), pipe.vae, tmp_path)
    davae.save_adapters(pipe, tmp_path)

    def change(file: str, edit: Any) -> None:
        with safe_open(tmp_path / file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(tmp_path / file)
        edit(tensors, metadata)
        save_file(tensors, tmp_path / file, metadata=metadata)

    def refused(message: str) -> None:
        with pytest.raises(DavaeError, match=message):
            davae.load_adapters(base("classes"), pipe.vae, tmp_path)
        davae.save_adapters(pipe, tmp_path)

    layer = next(key for key in load_file(tmp_path / LAYERS_FILE) if key.startswith("transformer."))
    change(LAYERS_FILE, lambda tensors, _: tensors.pop(layer))
    refused("have different widened layers: " + layer.removeprefix("transformer."))
    change(LAYERS_FILE, lambda tensors, _: tensors.update({layer: tensors[layer][..., :1].contiguous()[:3]}))
    refused("has shape")
    change(LORA_FILE, lambda tensors, _: tensors.pop(next(iter(tensors))))
    refused("tensors do not fit the transformer")
    change(LAYERS_FILE, lambda _, metadata: metadata.update(davae='{"format": 99}'))
    refused("has format 99")
    (tmp_path / LORA_FILE).unlink()
    refused(f"{LORA_FILE} does not exist")
    (tmp_path / LAYERS_FILE).write_bytes(b"not a file of tensors")
    refused("is damaged")


def test_a_fused_lora_or_a_base_pipeline_is_not_saved(tmp_path: Path) -> None:
    pipe = tuned("classes")
    pipe.transformer.fuse_lora()
    with pytest.raises(DavaeError, match="unfuse_lora"):
        davae.save_adapters(pipe, tmp_path)
    with pytest.raises(DavaeError, match="is not upgraded"):
        davae.save_adapters(base("classes"), tmp_path)
    with pytest.raises(DavaeError, match="has an adapter already"):
        attach_lora(pipe.transformer, LoraConfig(r=1, target_modules=TARGETS))
    with pytest.raises(DavaeError, match="does not accept this adapter"):
        attach_lora(base("dit").transformer, LoraConfig(r=1, target_modules=["nothing_of_it"]))


def test_samples_know_a_model_in_any_precision_and_no_other() -> None:
    weights = {"a": torch.randn(50, 3), "b": torch.randn(7)}
    saved = Samples.of(weights)
    assert saved.values.shape == (15,)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rounded = {name: value.to(dtype) for name, value in weights.items()}
        assert saved.first_difference(rounded) is None
        assert Samples.of(rounded).first_difference(weights) is None
    half = {name: value.half() for name, value in weights.items()}
    brain = {name: value.bfloat16() for name, value in weights.items()}
    assert Samples.of(half).first_difference(brain) is None
    assert saved.first_difference(weights | {"b": weights["b"] * (1 + 1e-5)}) == "'b' has other values"
    assert "more weights" in str(saved.first_difference(weights | {"c": torch.ones(1)}))
    assert "fewer weights" in str(saved.first_difference({"a": weights["a"]}))
