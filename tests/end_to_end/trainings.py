"""Several trainings one after the other in the same processes.

A job is ``{"stage": ..., "out": ..., "overrides": [...], "autoencoder": ...}``; the stages are those of
``davae train``, and ``poisoned``, a toy of which one gradient is not finite in one step.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from davae.recipes.loop import LoopSettings, OptimizerSettings
from davae.recipes.read import load_recipe
from davae.training.loop.loop import train
from davae.training.runs.train import train_autoencoder, train_diffusion
from davae.training.stage import Stage, TrainedModule

POISONED_STEP = 1


class _Numbers(torch.utils.data.Dataset):
    classes = ("a",)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return {
            "image": torch.full((3,), float(index)),
            "label": 0,
            "caption": "",
            "id": str(index),
            "skipped": [],
        }


class _Poisoned(nn.Module):
    """The one element of ``bad`` belongs to the first process when it is sharded; its gradient is NaN once."""

    _supports_gradient_checkpointing = True  # what the shipped configuration asks of a model

    def enable_gradient_checkpointing(self):
        pass

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.bad = nn.Parameter(torch.ones(1))

    def forward(self, batch, step):
        total = self.layer(batch["image"]).square().mean() * self.bad.sum()
        if step == POISONED_STEP:
            total = total + (self.bad * 0).sqrt().sum()
        return {"total": total}


class PoisonedStage(Stage):
    """Four steps, with averages."""

    name = "poisoned"

    def __init__(self):
        torch.manual_seed(0)
        self.loop = LoopSettings(
            steps=4,
            batch_size=2,
            log_every=1,
            checkpoint_every=1,
            checkpoints_total_limit=9,
            ema_decay=0.5,
            report_to=[],
        )
        self.dataset = _Numbers()
        self.modules = [TrainedModule("model", _Poisoned(), OptimizerSettings(learning_rate=0.01))]

    def validate(self, samples, step):
        return {"first": float(self.modules[0].module.layer.weight[0, 0])}

    def export(self, out):
        return out


def run(job: dict) -> None:
    """One training; those of real stages are of the debug recipe."""
    out = Path(job["out"])
    if job["stage"] == "poisoned":
        train(PoisonedStage(), out, {})
    elif job["stage"] == "autoencoder":
        train_autoencoder(load_recipe("debug", job["overrides"]), out)
    else:
        train_diffusion(load_recipe("debug", job["overrides"]), out, Path(job["autoencoder"]))


def run_all(jobs: list[dict]) -> None:
    """One after the other, in processes that know each other already or learn it from the first."""
    for job in jobs:
        run(job)
