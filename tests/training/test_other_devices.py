"""Steps on another device than the CPU: torch's meta device refuses to add, stack or choose from tensors of both.

It has no numbers either, so that a step which waits for one (``float(loss)``) fails as well.
"""

import copy
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderDC
from tests.training.test_text_stage import _stage

from davae.bases.debug_pipelines import SMALL_PIPELINES
from davae.bases.tiny import debug_base
from davae.data.loading.stream import collate
from davae.models import AutoencoderDA
from davae.recipes.loop import LoopSettings
from davae.recipes.settings import AlignmentSettings, ReconstructionSettings
from davae.training.autoencoder.objective import StructuredObjective
from davae.training.autoencoder.plain_objective import PlainObjective
from davae.training.engine.tensors import gradient_norms
from davae.training.loop.averages import RunningMeans
from davae.training.loop.bad_steps import NonFiniteGuard
from davae.training.loop.loop import to_device

META = torch.device("meta")


def _step(objective, batch, folder, monkeypatch):
    """Devices of a step's losses and gradients, after they were judged and summed up as the loop does."""
    other = copy.deepcopy(objective).to(META)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # knows no meta device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    losses = other(to_device(batch, META), 1)
    losses["total"].backward()
    trained = [p for p in other.parameters() if p.grad is not None]
    norms = gradient_norms(trained)
    window = RunningMeans(META)
    window.add(losses)
    guard = NonFiniteGuard("toy", LoopSettings(steps=1, batch_size=1, skip_grad_norm=1.0), folder)
    good = guard.check(1, "model", [losses], [], [], norms, None)
    assert trained
    return {v.device.type for v in [*losses.values(), norms, good, window.tensors()[1]]}


@pytest.mark.parametrize(
    "family",
    [f for f in SMALL_PIPELINES if f != "lumina2"],  # its transformer in diffusers reads the lengths of prompts
)
def test_the_diffusion_stage(family, tmp_path, monkeypatch):
    stage = _stage(family)
    batch = collate([{"id": "", "skipped": (), "caption": "", "label": 0, **stage.dataset[i]} for i in range(2)])
    assert _step(stage.objective, batch, tmp_path, monkeypatch) == {"meta"}


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_autoencoder_stage(adaptive, tmp_path, monkeypatch):
    vae = AutoencoderDA.from_base(debug_base().vae, scale=2, detail_channels=8).train()
    alignment = AlignmentSettings(adaptive=adaptive)
    objective = StructuredObjective(vae, alignment, ReconstructionSettings(), [None])
    batch = {"image": torch.zeros(2, 3, 32, 32)}
    assert _step(objective, batch, tmp_path, monkeypatch) == {"meta"}


def test_dc_ae(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = AutoencoderDC(
        latent_channels=4,
        encoder_block_out_channels=(8, 16),
        decoder_block_out_channels=(8, 16),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
    )
    objective = PlainObjective(model, [model], ReconstructionSettings())
    assert _step(objective, {"image": torch.zeros(2, 3, 16, 16)}, tmp_path, monkeypatch) == {"meta"}
