"""Kill a training again and again, at random moments and while it writes, and see that nothing shows.

    python -m tests.end_to_end.kills --kills 100

trains stage 1 of the embedded recipe in a child process that is killed (SIGKILL) as often as asked, then lets it
finish and compares every exported and checkpointed file with an undisturbed run's.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from davae.training.checkpoint import checkpoints, load_checkpoint
from davae.training.recipe import load_recipe
from davae.training.run import train_autoencoder

_FORK = multiprocessing.get_context("fork")  # a child need not import torch again


def _train(recipe: str, overrides: list[str], out: Path) -> None:
    torch.set_num_threads(1)  # sums in the same order in every process
    with open(out.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        train_autoencoder(load_recipe(recipe, overrides), out)


def _child(recipe: str, overrides: list[str], out: Path) -> multiprocessing.Process:
    process = _FORK.Process(target=_train, args=(recipe, overrides, out))
    process.start()
    return process


def run_and_kill(recipe: str, overrides: list[str], kills: int, folder: Path, seed: int = 0) -> dict:
    """Train once undisturbed and once with `kills` kills; returns what was seen.

    Half of the kills come a random time after the newest checkpoint, the other half as soon as the next
    checkpoint is being written.
    """
    draw = random.Random(seed)
    whole, killed = folder / "whole", folder / "killed"
    process = _child(recipe, overrides, whole)
    began = time.monotonic()
    process.join()
    assert process.exitcode == 0, whole.with_suffix(".log").read_text()
    step_seconds = (time.monotonic() - began) / load_recipe(recipe, overrides).autoencoder.loop.steps

    done, in_writing, lives, broken = 0, 0, 0, []
    while done < kills:
        process, lives = _child(recipe, overrides, killed), lives + 1
        writing = done % 2 == 1
        first = _newest(killed)
        while process.is_alive() and _newest(killed) == first:  # a life gets at least one checkpoint further
            time.sleep(0.0005)
        if writing:
            while process.is_alive() and not list((killed / "checkpoints").glob(".step-*")):
                time.sleep(0.0002)
        else:
            time.sleep(draw.uniform(0, 2 * step_seconds))
        in_writing += bool(list((killed / "checkpoints").glob(".step-*")))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"the run ended after {done} of {kills} kills; give it more steps")
        done += 1
        for path in checkpoints(killed / "checkpoints"):
            try:
                load_checkpoint(path)
            except ValueError as error:
                broken.append(str(error))
    process = _child(recipe, overrides, killed)
    process.join()
    assert process.exitcode == 0, killed.with_suffix(".log").read_text()
    return {
        "kills": done,
        "while_writing": in_writing,
        "lives": lives + 1,
        "broken_checkpoints": broken,
        "files": len(_hashes(whole)),
        "differing": sorted(k for k, v in _hashes(whole).items() if _hashes(killed).get(k) != v),
    }


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
    asked = parser.parse_args()
    overrides = overrides_for(asked.recipe, asked.kills)
    with tempfile.TemporaryDirectory() as folder:
        print(
            json.dumps(run_and_kill(asked.recipe, overrides, asked.kills, Path(folder), asked.seed), indent=1)
        )


def overrides_for(recipe: str, kills: int) -> list[str]:
    """Enough steps that so many lives fit in, and a checkpoint every second one."""
    loop = {"steps": 8 * kills + 40, "checkpoint_every": 2, "validate_every": 0, "validation_images": 4}
    loop["report_to"] = []
    data = {"data.path": "procedural:48", "data.hold_out": 8} if recipe == "tiny" else {}
    return [f"autoencoder.loop.{k}={v}" for k, v in loop.items()] + [f"{k}={v}" for k, v in data.items()]


if __name__ == "__main__":
    main()
