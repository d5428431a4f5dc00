"""Saved pipelines open anywhere: in other processes, with davae and without, with the same pixels."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from tests.end_to_end import children
from tests.pipelines.parts import upgraded

import davae
from davae.bases.debug_pipelines import SMALL_PIPELINES, call_arguments, small_pipeline
from davae.bases.tiny import debug_base
from davae.errors import DavaeError
from davae.models.remote_code import custom_code
from davae.pipelines import attach_lora


def pixels(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(pipe(**arguments, generator=torch.Generator().manual_seed(0), return_dict=False)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with a pipeline of each kind, and the pixels that they make in this process."""
    folder = tmp_path_factory.mktemp("pipelines")
    calls: dict[str, dict[str, Any]] = {name: call_arguments(name, scale=2) for name in SMALL_PIPELINES}
    calls["classes"] = {"class_labels": [3], "num_inference_steps": 2, "output_type": "pt"}
    made = {}
    for name, arguments in calls.items():
        pipe = upgraded(debug_base() if name == "classes" else small_pipeline(name))
        pipe.save_pretrained(folder / name)
        made[name] = pixels(pipe, arguments)
        if name == "sd3":
            made["vae"] = pipe.vae(torch.linspace(-1, 1, 12288).view(1, 3, 64, 64)).sample.detach()
            made["again"] = made[name]
    made["lumina2 by davae"] = made["lumina2"]
    calls["lumina2"] |= {side: calls["lumina2"][side] // 2 for side in ("height", "width")}  # counts in 8 pixels
    (folder / "calls.json").write_text(json.dumps(calls))
    return folder, made


def _run_script(script: Path, *arguments: str) -> None:
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("mode", ["with", "without"])
def test_opens_in_a_fresh_process_with_the_same_pixels(
    mode: str, saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = saved
    script = Path(__file__).with_name("open_elsewhere.py")
    if mode == "with":
        log = tmp_path / "log"
        children.finish(children.start(_run_script, script, str(folder), mode, log=log), log)
    else:  # an interpreter that has never imported davae
        ended = subprocess.run(
            [sys.executable, "-P", script, folder, mode],
            env=os.environ | {"HF_MODULES_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr[-3000:]
    found = load_file(folder / f"{mode}.safetensors")
    others = {"with": {"vae", "again"}, "without": {"lumina2 by davae"}}[mode]
    assert set(found) == set(expected) - others
    for name, values in found.items():
        assert values.std() > 1e-3, f"{name} is empty"
        difference = (values - expected[name]).abs().max()  # rounding alone: memory is laid out otherwise
        assert difference < 1e-5, f"{name}: {difference}"


def test_one_index_for_both_worlds(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    index = json.loads((folder / "classes" / "model_index.json").read_text())
    assert index["vae"] == ["davae", "AutoencoderDA"]
    assert index["transformer"] == ["davae", "LightningDiTTransformer2DModel"]
    config = json.loads((folder / "classes" / "vae" / "config.json").read_text())
    assert config["auto_map"] == {"AutoModel": "davae.AutoencoderDA"}
    assert (folder / "classes" / "vae" / "davae.py").read_text() == custom_code("AutoencoderDA")


def test_load_pipeline_runs_davae_s_own_classes(saved: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, expected = saved
    poisoned = folder / "classes" / "vae" / "davae.py"
    code = poisoned.read_text()
    poisoned.write_text("raise RuntimeError('run without consent')")
    try:
        pipe = davae.load_pipeline(folder / "classes")
        assert type(pipe) is davae.ClassConditionalPipeline
        assert type(pipe.vae) is davae.AutoencoderDA
        (tmp_path / "pipeline").symlink_to(folder / "classes")
        pipe = davae.load_pipeline(tmp_path)  # a run directory
    finally:
        poisoned.write_text(code)
    arguments = json.loads((folder / "calls.json").read_text())["classes"]
    torch.testing.assert_close(pixels(pipe, arguments), expected["classes"], rtol=0, atol=0)
    with pytest.raises(DavaeError, match=r"no model_index\.json"):
        davae.load_pipeline(folder)


def test_a_component_can_be_replaced_on_loading(saved: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = saved
    vae = davae.AutoencoderDA.from_pretrained(folder / "sd3" / "vae")
    assert DiffusionPipeline.from_pretrained(folder / "sd3", vae=vae).vae is vae


def test_a_derived_class_does_not_ship_davae_s_code(tmp_path: Path) -> None:
    class Derived(davae.AutoencoderDA):
        __module__ = __name__

    base = debug_base().vae
    Derived.from_base(base, scale=2, detail_channels=4).save_pretrained(tmp_path)
    assert not (tmp_path / "davae.py").exists()


def test_save_pipeline_merges_a_copy_and_writes_the_card(tmp_path: Path) -> None:
    pipe = upgraded(debug_base())
    targets = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    attach_lora(pipe.transformer, targets)
    arguments = {"class_labels": [3], "num_inference_steps": 2, "output_type": "pt"}
    before = pixels(pipe, arguments)
    davae.save_pipeline(pipe, tmp_path / "out", base_model="someone/base", license="mit")
    assert pipe.transformer.peft_config, "the pipeline keeps its LoRA"
    opened = davae.load_pipeline(tmp_path / "out")
    assert not hasattr(opened.transformer, "peft_config")
    torch.testing.assert_close(pixels(opened, arguments), before, rtol=0, atol=1e-5)
    assert "license: mit" in (tmp_path / "out" / "README.md").read_text()


def test_without_a_licence_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(DavaeError, match="licence of the base 'someone/base' is not known"):
        davae.save_pipeline(upgraded(debug_base()), tmp_path / "out", base_model="someone/base")
    assert not (tmp_path / "out").exists()
    with pytest.raises(DavaeError, match="not upgraded"):
        davae.save_pipeline(debug_base(), tmp_path / "out", base_model="someone/base", license="mit")
