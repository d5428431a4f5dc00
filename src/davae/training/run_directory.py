"""The files of a run: resolved recipe, environment, metrics."""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from davae.errors import DavaeError
from davae.training.recipe import differing_keys, with_later_settings

logger = logging.getLogger(__name__)
_PACKAGES = ("davae", "torch", "diffusers", "accelerate", "peft", "transformers", "safetensors", "datasets")

#: Settings that say how steps are computed and kept, not what is learnt: a run may go on with others, so that
#: it fits another machine, another number of processes, or the memory that was found too small.
_MAY_CHANGE = {
    "batch_size",
    "gradient_accumulation",
    "gradient_checkpointing",
    "precision",
    "workers",
    "timeout_s",
    "log_every",
    "checkpoint_every",
    "checkpoints_total_limit",
    "report_to",
}


class RunDirectory:
    """A training's folder: opened for a first start or to go on, refused for another recipe.

    Args:
        path: the folder; made where absent.
        recipe: the resolved recipe as plain values; kept in ``config.yaml``.
        facts: what ``environment.json`` says besides, such as where the base's weights came from.
        write: off on all but one of a run's processes.

    Raises:
        DavaeError: the folder holds a run that learns something else (each difference is named).
    """

    def __init__(
        self, path: Path, recipe: dict[str, Any], *, facts: dict[str, Any] | None = None, write: bool = True
    ) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.metrics_file = path / "metrics.jsonl"
        config = path / "config.yaml"
        if config.is_file():
            changed = differing_keys(recipe, with_later_settings(yaml.safe_load(config.read_text())))
            differing = [c for c in changed if c.partition(":")[0].rpartition(".")[2] not in _MAY_CHANGE]
            if changed and not differing:
                logger.info("%s goes on with %s", path, "; ".join(changed))
            if differing:
                raise DavaeError(
                    f"{path} holds a run with other settings ({'; '.join(differing[:5])}"
                    f"{' ...' if len(differing) > 5 else ''}); choose another --out, or remove the folder"
                )
        if not write:
            return
        path.mkdir(parents=True, exist_ok=True)
        _write_whole(config, yaml.safe_dump(recipe, sort_keys=False))
        _write_whole(path / "environment.json", json.dumps(environment() | (facts or {}), indent=2))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Within the block no other process may train here; a killed one leaves no lock behind.

        Raises:
            DavaeError: another process trains here.
        """
        lock, owner = FileLock(self.path / "run.lock"), self.path / "run.owner"
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            who = owner.read_text().strip() if owner.is_file() else "another process"
            raise DavaeError(
                f"{self.path} is in use: {who} trains there; wait for it, stop it, or choose another --out"
            ) from error
        try:
            owner.write_text(f"process {os.getpid()} on {platform.node()}\n")
            yield
        finally:
            owner.unlink(missing_ok=True)
            lock.release()

    def write_metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def forget_metrics_after(self, step: int) -> None:
        """Drop the lines that a resumed run will write again."""
        kept = [line for line in read_metrics(self.metrics_file) if line["step"] <= step]
        _write_whole(self.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))


def _write_whole(path: Path, text: str) -> None:
    """Write beside and rename: a full disk or a kill leaves what was there before."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line cut short by a kill is left out."""
    lines = []
    for text in file.read_text().splitlines() if file.is_file() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def environment() -> dict[str, Any]:
    """Versions, commit and hardware: what someone needs to repeat a figure."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "command": " ".join(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv)),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "device": device,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "commit": _commit(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree davae runs from; none where it was installed as a package."""
    tree = Path(__file__).resolve().parents[3]
    if not (tree / ".git").exists():
        return None
    result = subprocess.run(
        ["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() or None
