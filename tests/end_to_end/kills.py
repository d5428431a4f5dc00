"""Kill a training again and again, at random moments, while it writes and while it starts; see that nothing shows.

    python -m tests.end_to_end.kills --kills 100

trains stage 1 of the embedded recipe in a child process that is killed (SIGKILL) as often as asked, then lets it
finish and compares every exported and checkpointed file, and the logged losses, with an undisturbed run's. What was
seen is printed as JSON; the status is 1 where anything differs, or a checkpoint under its own name was not whole.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.end_to_end import children

from davae.recipes.read import load_recipe
from davae.training.checkpoints.checkpoint import checkpoints, load_checkpoint
from davae.training.checkpoints.run_directory import read_metrics
from davae.training.runs.train import train_autoencoder

_KINDS = ("after", "writing", "starting", "writing", "after")
_HOURS = 4 * 3600.0  # what the undisturbed run may take on a slow machine


def _train(recipe: str, overrides: list[str], out: Path) -> None:
    train_autoencoder(load_recipe(recipe, overrides), out)


def _child(recipe: str, overrides: list[str], out: Path, limit_s: float) -> BaseProcess:
    return children.start(_train, recipe, overrides, out, log=out.with_suffix(".log"), limit_s=limit_s)


@dataclass
class Pace:
    """How long things take, in seconds, so that random moments fall into them; learnt as lives go by."""

    step: float
    to_first: float = 60.0
    to_write: float = 0.01
    hit: bool = False

    def wait(self, kind: str, process: BaseProcess, run: Path, draw: random.Random) -> None:
        """Until the moment at which a life is to end."""
        began, first = time.monotonic(), _newest(run)
        if kind == "starting":
            time.sleep(draw.uniform(0, self.to_first))
            return
        while process.is_alive() and _newest(run) == first:  # a life gets at least one checkpoint further
            time.sleep(0.0005)
        self.to_first = min(self.to_first, time.monotonic() - began)  # lives that measure first take longer
        if kind == "after":
            time.sleep(draw.uniform(0, 2 * self.step))
            return
        second = _newest(run)
        while process.is_alive() and not _partial(run):
            time.sleep(0.0002)
        if not self.hit:  # one is sure to come while files are written, however busy the machine is
            self.hit = True
            _stop_while_writing(process, run)
            return
        began, moment = time.monotonic(), draw.uniform(0, self.to_write)
        while time.monotonic() - began < moment and _newest(run) == second:
            time.sleep(0.0002)
        if _newest(run) != second:  # it was written before
            self.to_write = time.monotonic() - began
        elif moment > 0.9 * self.to_write:  # it takes longer than was thought
            self.to_write *= 2


def run_and_kill(
    recipe: str,
    overrides: list[str],
    kills: int,
    folder: Path,
    seed: int = 0,
    limit_s: float = children.LIMIT_S,
) -> dict:
    """Train once undisturbed and once with `kills` kills; returns what was seen.

    Of five kills two come a random time after a new checkpoint, two a random time after the next one begins to be
    written (most of them inside; ``partial_files`` counts by how many of its files were there), and one at a random
    moment before a life has made any: while it reads, restores or makes its first steps.
    """
    draw = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    began = time.monotonic()
    children.finish(_child(recipe, overrides, whole, limit_s), whole.with_suffix(".log"))
    step_seconds = (time.monotonic() - began) / load_recipe(recipe, overrides).autoencoder.loop.steps

    done, starting, broken = 0, 0, []
    partial_files: Counter[int] = Counter()
    pace = Pace(step_seconds)
    while done < kills:
        kind, before = _KINDS[done % len(_KINDS)], _newest(killed)
        process = _child(recipe, overrides, killed, limit_s)
        pace.wait(kind, process, killed, draw)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            said = killed.with_suffix(".log").read_text()[-3000:]
            raise SystemExit(f"the run ended after {done} of {kills} kills; it may need more steps: {said}")
        done += 1
        if _newest(killed) == before:
            starting += 1  # what lies there half written is of a life before
        else:
            partial_files.update(len(list(folder.iterdir())) for folder in _partial(killed))
        for path in checkpoints(killed / "checkpoints"):
            try:
                load_checkpoint(path)
            except ValueError as error:
                broken.append(str(error))
    children.finish(_child(recipe, overrides, killed, limit_s), killed.with_suffix(".log"))
    return {
        "kills": done,
        "while_writing": sum(partial_files.values()),
        "partial_files": dict(sorted(partial_files.items())),
        "while_starting": starting,
        "broken_checkpoints": broken,
        "files": len(_hashes(whole)),
        "differing": sorted(k for k, v in _hashes(whole).items() if _hashes(killed).get(k) != v),
        "same_losses": read_metrics(whole / "metrics.jsonl") == read_metrics(killed / "metrics.jsonl"),
    }


def _stop_while_writing(process: BaseProcess, run: Path) -> None:
    """Halt a child between two files of a checkpoint; where it has just finished one, of the next."""
    while process.is_alive():
        os.kill(process.pid, signal.SIGSTOP)
        if _partial(run):
            return
        os.kill(process.pid, signal.SIGCONT)
        while process.is_alive() and not _partial(run):
            time.sleep(0.0002)


def _partial(run: Path) -> list[Path]:
    """Folders of checkpoints that are being written or removed."""
    return list((run / "checkpoints").glob(".step-*.partial"))


def _newest(run: Path) -> str | None:
    found = checkpoints(run / "checkpoints")
    return found[-1].name if found else None


def _hashes(run: Path) -> dict[str, str]:
    """SHA-256 of the weights and of the last checkpoint's files."""
    last = checkpoints(run / "checkpoints")[-1]
    files = [*run.rglob("diffusion_pytorch_model.safetensors"), *last.iterdir()]
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write what was seen to this file too")
    asked = parser.parse_args()
    overrides = overrides_for(asked.recipe, asked.kills)
    with tempfile.TemporaryDirectory() as folder:
        seen = run_and_kill(asked.recipe, overrides, asked.kills, Path(folder), asked.seed, _HOURS)
    print(json.dumps(seen, indent=1))
    if asked.out is not None:
        asked.out.write_text(json.dumps({"recipe": asked.recipe, "seed": asked.seed, **seen}, indent=1) + "\n")
    sys.exit(bool(seen["differing"] or seen["broken_checkpoints"] or not seen["same_losses"]))


def overrides_for(recipe: str, kills: int) -> list[str]:
    """Enough steps that so many lives fit in, and a checkpoint every second one."""
    loop = {"steps": 6 * kills + 24, "checkpoint_every": 2, "validate_every": 0, "validation_images": 4}
    loop["report_to"] = []
    data = {"data.path": "procedural:48", "data.hold_out": 8} if recipe == "tiny" else {}
    return [f"autoencoder.loop.{k}={v}" for k, v in loop.items()] + [f"{k}={v}" for k, v in data.items()]


if __name__ == "__main__":
    main()
