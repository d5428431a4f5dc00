"""A toy training whose processes meet different bad files, each saying what it saw."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from torch import nn

from davae.errors import DavaeError
from davae.recipes.loop import LoopSettings, OptimizerSettings
from davae.training.loop.loop import train
from davae.training.loop.signals import TrainingStopped
from davae.training.stage import Stage, TrainedModule


class _Numbers(torch.utils.data.Dataset):
    """Twelve numbers, of which each divisible by four is a bad file."""

    classes = ("a",)

    def __len__(self):
        return 12

    def __getitem__(self, index):
        skipped = [] if index % 4 else [(f"{index}.png", "damaged")]
        item = {"image": torch.full((3,), float(index)), "label": 0, "caption": "", "id": str(index)}
        return item | {"skipped": skipped}


class _Objective(nn.Module):
    def __init__(self, poisoned):
        super().__init__()
        self.poisoned = poisoned
        self.layer = nn.Linear(3, 1)
        self.seen = []

    def forward(self, batch, step):
        self.seen += batch["id"]
        losses = {"total": self.layer(batch["image"]).square().mean()}
        if self.poisoned:  # only shown, and no gradient comes of it
            losses["shown"] = losses["total"].detach() * (float("nan") if _rank() else 1.0)
        return losses


class _Stage(Stage):
    name = "toy"

    def __init__(self, *, poisoned=False, signalled=False):
        self.signalled = signalled
        self.loop = LoopSettings(
            steps=8,
            batch_size=1,
            log_every=2,
            validate_every=1,
            checkpoint_every=8,
            best_metric="error",
            max_skipped_steps=3,
            report_to=[],
        )
        self.dataset = _Numbers()
        self.objective = _Objective(poisoned)
        self.modules = [TrainedModule("model", self.objective, OptimizerSettings(learning_rate=0.01))]

    def validate(self, samples, step):
        if self.signalled and step == self.loop.steps and _rank():
            os.kill(os.getpid(), signal.SIGTERM)
        return {"error": abs(step - 3.0)}  # the best is a step at which no checkpoint is due

    def export(self, out):
        return out


def _rank():
    return torch.distributed.get_rank()


def _error_of(stage, out):
    try:
        train(stage, out, {})
    except (DavaeError, TrainingStopped) as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    """What one of the processes does."""
    stage = _Stage()
    result = train(stage, out, {})
    facts = {"skipped": result.skipped.entries, "seen": stage.objective.seen}
    apart = out if _rank() == 0 else out / "apart"  # a folder that the machines do not share
    facts["apart"] = _error_of(_Stage(), apart)
    facts["signalled"] = _error_of(_Stage(signalled=True), out / "signalled")
    facts["poisoned"] = _error_of(_Stage(poisoned=True), out / "poisoned")
    (out / f"rank-{_rank()}.json").write_text(json.dumps(facts))
