"""What a launcher says about DeepSpeed becomes its engine's configuration, or an error that says what to change."""

import pytest
from accelerate.state import PartialState

from davae.errors import DavaeError
from davae.recipes.loop import LoopSettings
from davae.training import deepspeed_settings
from davae.training.deepspeed_settings import asked_for, engine_settings
from davae.training.processes import start_processes
from davae.training.sharding import begin_accelerator

LOOP = LoopSettings(steps=1, batch_size=3, gradient_accumulation=2)


@pytest.fixture(autouse=True)
def asked(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")


def test_the_recipe_decides_batch_and_accumulation():
    assert asked_for()
    found = engine_settings(LOOP, processes=4)
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 2
    assert found["train_batch_size"] == 24
    assert found["gradient_clipping"] == 0.0
    assert found["zero_optimization"]["stage"] == 2
    assert "auto" not in str(found)


def test_a_file_of_deepspeeds_own_keeps_what_the_recipe_does_not_decide(monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": 12345}, "wall_clock_breakdown": true}'
    )
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    found = engine_settings(LOOP, processes=1)
    assert found["zero_optimization"]["reduce_bucket_size"] == 12345
    assert found["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("text", "loop", "told"),
    [
        ('{"zero_optimization": {"stage": 3}}', {}, r"ZeRO-3; set zero_stage: 2.*fsdp2\.yaml"),
        (
            '{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}',
            {},
            "offload_optimizer_device",
        ),
        ('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', {}, r"loop\.precision=bf16"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}', {}, "names the optimizer"),
        ('{"zero_optimization": {"stage": 2}}', {"precision": "fp16"}, "precision=fp16.*DeepSpeed"),
        ('{"zero_optimization": {"stage": 2}}', {"plain": True}, "plain=true.*DeepSpeed"),
    ],
)
def test_what_is_not_supported_is_refused(text, loop, told, monkeypatch, tmp_path):
    file = tmp_path / "deepspeed.json"
    file.write_text(text)
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(DavaeError, match=told):
        engine_settings(LoopSettings(steps=1, batch_size=1, **loop), processes=1)


@pytest.mark.parametrize("start", [start_processes, lambda: begin_accelerator(cpu=True)])
def test_without_deepspeed_a_run_says_so_before_anything_starts(start, monkeypatch):
    before = dict(PartialState._shared_state)
    monkeypatch.setattr(deepspeed_settings, "is_deepspeed_available", lambda: False)
    with pytest.raises(DavaeError, match=r"pip install deepspeed.*fsdp2-zero2\.yaml"):
        start()
    assert dict(PartialState._shared_state) == before
