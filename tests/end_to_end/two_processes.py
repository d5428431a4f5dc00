"""A toy training whose processes meet different bad files, started by torchrun; its first process says what it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from davae.training.loop import train
from davae.training.settings import LoopSettings, OptimizerSettings
from davae.training.stage import Player, Stage


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
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.seen = []

    def forward(self, batch, step):
        self.seen += batch["id"]
        return {"total": self.layer(batch["image"]).square().mean()}


class _Stage(Stage):
    name = "toy"

    def __init__(self):
        self.loop = LoopSettings(
            steps=8,
            batch_size=1,
            log_every=2,
            validate_every=1,
            checkpoint_every=8,
            best_metric="error",
            report_to=[],
        )
        self.dataset = _Numbers()
        self.objective = _Objective()
        self.players = [Player("model", self.objective, OptimizerSettings(learning_rate=0.01))]

    def validate(self, samples, step):
        return {"error": abs(step - 3.0)}  # the best is a step at which no checkpoint is due

    def export(self, out):
        return out


if __name__ == "__main__":
    out = Path(sys.argv[1])
    stage = _Stage()
    result = train(stage, out, {})
    rank = torch.distributed.get_rank()
    facts = {"skipped": result.skipped.entries, "seen": stage.objective.seen}
    (out / f"rank-{rank}.json").write_text(json.dumps(facts))
