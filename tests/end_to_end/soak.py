"""Train for a long time from WebDataset shards and see that nothing grows.

    python -m tests.end_to_end.soak --minutes 30

writes shards, trains stage 1 of the embedded recipe from them with `davae train` and watches it from outside: memory
(of the training and its loader processes, shared pages once), open files and steps. The figures are printed as JSON;
the status is 1 where memory is not flat to 5 %, throughput to 10 %, or open files are not constant.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from davae.data import CLASSES, render_scene

MEMORY, THROUGHPUT = 0.05, 0.10
_WINDOWS = 8
_WARM_UP = 0.2  # share of the time that is not judged: allocators and caches fill


@dataclass(frozen=True)
class Sample:
    """The training as it was at one moment."""

    seconds: float
    memory: int  # bytes
    files: int
    step: int


def write_shards(folder: Path, images: int, side: int, *, a_shard: int = 100) -> Path:
    """Rendered scenes with class and caption as WebDataset shards."""
    folder.mkdir(parents=True)
    for first in range(0, images, a_shard):
        with tarfile.open(folder / f"part-{first // a_shard:03d}.tar", "w") as archive:
            for number in range(first, min(images, first + a_shard)):
                kind = number % len(CLASSES)
                picture = io.BytesIO()
                Image.fromarray(render_scene(kind, number, side)).save(picture, "PNG")
                members = {
                    "png": picture.getvalue(),
                    "cls": str(kind).encode(),
                    "txt": CLASSES[kind].encode(),
                }
                for ending, content in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
    return folder


def soak(recipe: str, overrides: list[str], seconds: float, out: Path, *, every: float = 1.0) -> dict:
    """Train for so many seconds after the first logged step; returns what was seen.

    The training is ended with SIGTERM, as a cluster does, and must save and say so.
    """
    command = [sys.executable, "-m", "davae", "train", "autoencoder", "--recipe", recipe, "--out", str(out)]
    with open(out.with_suffix(".log"), "w") as log:
        process = subprocess.Popen([*command, *overrides], stdout=log, stderr=log)
        try:
            samples = _watch(process, out, seconds, every)
        finally:
            process.send_signal(signal.SIGTERM)
            status = process.wait()
    if status != 128 + signal.SIGTERM:
        raise SystemExit(f"status {status}: {out.with_suffix('.log').read_text()[-3000:]}")
    return check(samples)


def _watch(process: subprocess.Popen, out: Path, seconds: float, every: float) -> list[Sample]:
    samples: list[Sample] = []
    began = None
    while process.poll() is None:
        time.sleep(every)
        step = _last_step(out / "metrics.jsonl")
        if step is None:
            continue
        began = began or time.monotonic()
        tree = _tree(process.pid)
        now = time.monotonic() - began
        samples.append(Sample(now, sum(map(_memory, tree)), sum(map(_files, tree)), step))
        if now >= seconds:
            break
    return samples


def check(samples: list[Sample]) -> dict:
    """Median memory, fewest open files, and steps a second, in windows of equal time after the warm-up.

    ``memory_spread`` and ``throughput_spread`` are the largest difference between two windows over the smallest. Files
    are constant where the second half never has more open than the first: batches on their way from loader processes
    are open files too, a few more or less.
    """
    end = samples[-1].seconds
    start = _WARM_UP * end
    width = (end - start) / _WINDOWS
    windows = []
    for i in range(_WINDOWS):
        inside = [s for s in samples if start + i * width <= s.seconds <= start + (i + 1) * width]
        first, last = inside[0], inside[-1]
        windows.append(
            {
                "seconds": round(first.seconds, 1),
                "memory_mb": round(statistics.median(s.memory for s in inside) / 1e6, 1),
                "files": min(s.files for s in inside),  # images and checkpoints are open for moments
                "steps_per_second": round((last.step - first.step) / max(last.seconds - first.seconds, 1e-9), 3),
            }
        )
    memory, rates, files = ([w[k] for w in windows] for k in ("memory_mb", "steps_per_second", "files"))
    found = {
        "seconds": round(end, 1),
        "steps": samples[-1].step,
        "memory_spread": round(_spread(memory), 4),
        "throughput_spread": round(_spread(rates), 4),
        "files": files,
    }
    flat = {
        "memory_flat": found["memory_spread"] <= MEMORY,
        "throughput_flat": found["throughput_spread"] <= THROUGHPUT,
        "files_constant": min(files[_WINDOWS // 2 :]) <= min(files[: _WINDOWS // 2]),
    }
    return {**found, **flat, "windows": windows}


def _last_step(file: Path) -> int | None:
    """The last whole line's step; the file may be long."""
    if not file.is_file():
        return None
    with file.open("rb") as lines:
        lines.seek(max(0, file.stat().st_size - 4096))
        whole = lines.read().rpartition(b"\n")[0].splitlines()
    return json.loads(whole[-1])["step"] if whole else None


def _spread(values: list[float]) -> float:
    return (max(values) - min(values)) / min(values) if min(values) > 0 else float("inf")


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for parent in found:  # grows while it is walked
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, task.read_text().split())
            except OSError:  # ended meanwhile
                continue
    return found


def _memory(pid: int) -> int:
    """Bytes of its own, pages shared with a child process in halves; 0 for a process that has ended.

    Pages of files are left out: those of torch's libraries count for fewer or more as other processes that map them
    come and go.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def _files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def overrides_for(recipe: str, shards: Path, workers: int) -> list[str]:
    """Endless steps over the shards, with a checkpoint and a validation every now and then."""
    every = {"tiny": 100, "debug": 20}[recipe]
    loop = {"steps": 10_000_000, "log_every": 1, "checkpoint_every": every, "validate_every": 2 * every}
    loop |= {"validation_images": 4}
    return [
        f"data.path={shards}",
        "data.hold_out=8",
        f"data.workers={workers}",
        *(f"autoencoder.loop.{k}={v}" for k, v in loop.items()),
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--recipe", choices=("tiny", "debug"), default="tiny")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--out", type=Path, help="write the figures to this file too")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(Path(folder) / "shards", asked.images, side=144)
        overrides = overrides_for(asked.recipe, shards, asked.workers)
        seen = soak(asked.recipe, overrides, 60 * asked.minutes, Path(folder) / "run")
    text = json.dumps({"recipe": asked.recipe, "workers": asked.workers, **seen}, indent=1)
    print(text)
    if asked.out is not None:
        asked.out.write_text(text + "\n")
    sys.exit(not (seen["memory_flat"] and seen["throughput_flat"] and seen["files_constant"]))


if __name__ == "__main__":
    main()
