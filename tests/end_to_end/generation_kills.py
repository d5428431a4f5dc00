"""Kill a generation run again and again at random moments, and see that neither its images nor its figures show it.

    python -m tests.end_to_end.generation_kills --count 500 --kills 2

makes images with `davae evaluate generation` in a child process that is killed (SIGKILL) as often as asked, lets it
finish, and compares every image and every figure with those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.end_to_end import children

from davae.cli.evaluate import generation

_BATCH = 4
_LIMIT_S = 3600.0  # five hundred images and a network of features take minutes


def _generate(out: Path, count: int, features: list[str]) -> None:
    generation(
        "debug",
        f"procedural:{count}",
        out,
        count=count,
        steps=2,
        guidance=1.0,
        batch=_BATCH,
        features=features,
        device="cpu",
    )


def _child(out: Path, count: int, features: list[str]) -> BaseProcess:
    return children.start(_generate, out, count, features, log=out.with_suffix(".log"), limit_s=_LIMIT_S)


def generate_and_kill(
    count: int, kills: int, folder: Path, *, features: list[str] | None = None, seed: int = 0
) -> dict:
    """Make images once undisturbed and once with `kills` kills; returns what was seen."""
    draw = random.Random(seed)
    features = features or []
    whole, killed = folder / "whole", folder / "killed"
    children.finish(_child(whole, count, features), whole.with_suffix(".log"))
    found_at = []
    for life in range(kills):
        process = _child(killed, count, features)
        # Somewhere in the next share of the work, and then at no moment in particular: in a batch, or in a file.
        wanted = (life + 1) * count // (kills + 1) + draw.randrange(_BATCH)
        while process.is_alive() and _images(killed) < wanted:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise SystemExit(f"the run ended after {life} of {kills} kills; make more images")
        found_at.append(_images(killed))
    children.finish(_child(killed, count, features), killed.with_suffix(".log"))
    ours, theirs = _hashes(killed), _hashes(whole)
    return {
        "images": len(ours),
        "distinct": len(set(ours.values())),
        "images_at_each_kill": found_at,
        "differing": sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)),
        "figures": _figures(killed),
        "figures_undisturbed": _figures(whole),
    }


def _images(run: Path) -> int:
    return len(list((run / "upgraded" / "images").glob("0*.png")))


def _hashes(run: Path) -> dict[str, str]:
    files = (run / "upgraded" / "images").glob("0*.png")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _figures(run: Path) -> dict[str, float]:
    return json.loads((run / "evaluation.json").read_text())["rows"]["upgraded"]["figures"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--features", action="append", help="A feature network, such as efficientnet-lite0.")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seen = generate_and_kill(asked.count, asked.kills, Path(folder), features=asked.features, seed=asked.seed)
    print(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()
