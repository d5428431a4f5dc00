"""Small pipelines: the real classes, made in no time, and they behave."""

from __future__ import annotations

import socket

import pytest
import torch
from diffusers import DiffusionPipeline

from davae.bases.debug_pipelines import SMALL_PIPELINES, base_resolution, call_arguments, small_pipeline
from davae.bases.debug_text import VOCABULARY
from davae.bases.open import load_base
from davae.errors import DavaeError

CLASSES = {
    "sd3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "pixart-sigma": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
    "dit": "DiTPipeline",
    "qwenimage": "QwenImagePipeline",
    "lumina2": "Lumina2Pipeline",
    "auraflow": "AuraFlowPipeline",
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a small pipeline must need no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def images(pipe: DiffusionPipeline, name: str, prompt: str = "a red fox in snow") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.as_tensor(pipe(**call_arguments(name, prompt=prompt), generator=generator).images)


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_it_paints_and_answers_to_the_prompt(name: str) -> None:
    pipe = small_pipeline(name)
    assert type(pipe).__name__ == CLASSES[name]
    side = base_resolution(name)
    red, blue = images(pipe, name), images(pipe, name, "a blue house near the sea")
    assert red.shape == (1, 3, side, side)
    assert red.isfinite().all()
    assert red.std() > 0.05
    assert (red - blue).abs().max() > 0.02


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_the_same_at_every_call_saved_and_loaded(name: str, tmp_path) -> None:
    state = torch.random.get_rng_state()
    pipe, twin, other = small_pipeline(name), small_pipeline(name), small_pipeline(name, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    expected = images(pipe, name)
    assert torch.equal(expected, images(twin, name))
    assert not torch.equal(expected, images(other, name))
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    # Loaded weights lie elsewhere in memory, which the order of summation may follow.
    torch.testing.assert_close(expected, images(loaded, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", SMALL_PIPELINES)
def test_tokenizers_know_any_text(name: str) -> None:
    pipe = small_pipeline(name)
    for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        tokenizer = getattr(pipe, part, None)
        if tokenizer is None:
            continue
        fox = tokenizer("a red fox in snow").input_ids
        assert len(fox) <= 12, f"{part} cuts common words into {len(fox)} pieces"
        assert fox != tokenizer("a zebra").input_ids
        assert max(tokenizer("Zürich, 東京 & zebra?!").input_ids) < VOCABULARY


def test_load_base_knows_them() -> None:
    assert type(load_base("debug-sd3")).__name__ == "StableDiffusion3Pipeline"
    with pytest.raises(DavaeError, match="no small pipeline 'sd9': choose one of sd3, flux"):
        load_base("debug-sd9")
