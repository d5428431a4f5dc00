"""The files of a run: resolved recipe, environment (versions, hardware, origin of weights and data), metrics, lock."""

import importlib.util
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from davae.data import ItemDataset
from davae.errors import DavaeError
from davae.evaluation.metrics.names import current_names
from davae.recipes.data import DataSettings
from davae.recipes.read import differing_keys, movable_keys, resumable_keys, with_later_settings
from davae.recipes.settings import UpgradeRecipe
from davae.recipes.yaml_text import plain_yaml
from davae.runtime.atomic_files import atomic_json, atomic_write, set_aside
from davae.runtime.package_files import TINY, shipped
from davae.runtime.places import check_place, claim
from davae.runtime.text_files import lines_of, plain_json, read_text
from davae.training.checkpoints.checkpoint import checkpoints, plain_values
from davae.training.checkpoints.foundations import stands_on

logger = logging.getLogger(__name__)
_PACKAGES = ("davae", "torch", "diffusers", "accelerate", "peft", "transformers", "safetensors", "datasets")


_PLACES = frozenset({"autoencoder_folder", "start"})
"""Entries stored beside the recipe that are paths, like the settings marked ``MAY_MOVE``."""
_SHAPES = ("autoencoder.model.scale", "autoencoder.model.detail_channels", "diffusion.tune")
"""Settings, or their sections, that decide which weights there are: with others, weights of a run may not fit."""


class RunDirectory:
    """A training's folder, opened to start or to resume a run.

    Nothing is written before :meth:`locked`. Opened before images and weights are, it refuses other settings at once.

    Args:
        path: the folder.
        recipe: the resolved recipe as plain values; stored in ``config.yaml``.
        facts: further entries of ``environment.json``, such as the origin of the base's weights.
        other_sections: sections of the recipe that only another stage reads; they may change.

    Raises:
        DavaeError: the folder holds something else, a run with other settings (the message names the first five
            differences), or checkpoints of a run whose ``config.yaml`` cannot be read.
    """

    def __init__(
        self,
        path: Path,
        recipe: dict[str, Any],
        *,
        facts: dict[str, Any] | None = None,
        other_sections: Sequence[str] = (),
    ) -> None:
        self.path, self.recipe, self.facts = path, recipe, facts or {}
        self.other_sections = other_sections
        self.config = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.metrics_file = path / "metrics.jsonl"
        check_place(path, "run")
        self.changed()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock for the duration of the block; a killed process leaves no lock behind.

        Raises:
            DavaeError: another process trains here, or has started a run with other settings in the meantime.
        """
        with claim(self.path, "run"):
            self.changed()
            yield

    def begin(self) -> None:
        """Write ``config.yaml`` and ``environment.json``, where nothing refuses the run; within :meth:`locked`.

        A ``config.yaml`` that cannot be read is kept beside.
        """
        changed = self.changed()
        if changed:
            logger.info("%s goes on with %s", self.path, "; ".join(changed))
        if self.config.is_file() and read_config(self.config) is None:
            logger.warning("%s is damaged and written again; it is kept as %s", self.config, set_aside(self.config))
        atomic_write(self.config, yaml.safe_dump(self.recipe, sort_keys=False))
        atomic_json(self.path / "environment.json", environment() | self.facts)

    def write_metrics(self, step: int, values: dict[str, float]) -> None:
        """Append one line to ``metrics.jsonl``."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop what a run resuming from ``step`` will write again: metrics and skipped steps of all processes.

        Lines that a kill cut short are dropped too, as the next line would be appended to them. Call this before the
        first line is written. With ``step`` 0 the old files are kept as ``<file>.before``.
        """
        for file in (self.metrics_file, *self.path.glob("skipped_steps*.jsonl")):
            before = file.read_bytes().decode(errors="replace") if file.is_file() else ""
            kept = [line for line in read_metrics(file) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            if text != before:
                if not step:  # these lines may be all that is left of the earlier run
                    atomic_write(file.with_name(f"{file.name}.before"), before)
                atomic_write(file, text)

    def changed(self) -> list[str]:
        """The differences from the settings stored here, all in keys that may change on resume.

        Raises:
            DavaeError: other keys differ, or there are checkpoints and the stored settings cannot be read.
        """
        if not self.config.is_file():
            return []
        known = read_config(self.config)
        if known is None:
            if checkpoints(self.checkpoints):
                raise DavaeError(
                    f"{self.config} is damaged, as a power cut may leave it, and there are checkpoints, which may be "
                    "of a run with other settings. If you know that they are of this run, remove the file and run the "
                    "same command again; otherwise choose another --out"
                )
            return []
        changed = differing_keys(self.recipe, with_later_settings(known))
        changed = [c for c in changed if c.partition(".")[0].partition(":")[0] not in self.other_sections]
        kind = self.recipe.get("kind", "upgrade")
        allowed = resumable_keys(kind)
        if self._knows_contents():
            allowed |= movable_keys(kind) | _PLACES
        differing = [c for c in changed if c.partition(":")[0] not in allowed or _begins_elsewhere(c)]
        if differing:
            raise DavaeError(
                f"{self.path} holds a run with other settings ({'; '.join(differing[:5])}"
                f"{' ...' if len(differing) > 5 else ''}); go on with those it had, or choose another --out"
                f"{self._start_from(differing)}"
            )
        return changed

    def _knows_contents(self) -> bool:
        """Whether paths may change, since contents are compared: the newest checkpoint has hashes, or there is none."""
        found = checkpoints(self.checkpoints)
        return not found or stands_on(plain_values(found[-1])) is not None

    def _start_from(self, differing: Sequence[str]) -> str:
        """Advice on starting another run from the weights of this one, if it is finished and they fit."""
        if self.recipe.get("kind", "upgrade") != "upgrade" or any(change.startswith(_SHAPES) for change in differing):
            return ""
        for folder, section in (("pipeline", "diffusion"), ("autoencoder", "autoencoder")):
            if (self.path / folder).is_dir():
                return f"; {section}.start_from={self.path} begins there with the weights of this one"
        return ""


def _begins_elsewhere(change: str) -> bool:
    """Whether weights that a run begins with are given where none were, or none where some were: no move."""
    key, _, values = change.partition(": ")
    return key.rpartition(".")[2] in ("start_from", *_PLACES) and "None" in values.split(" -> ")


def read_config(file: Path) -> dict[str, Any] | None:
    """A run's resolved recipe; ``None`` if the file is damaged."""
    try:
        recipe = plain_yaml(read_text(file))
    except (ValueError, DavaeError):
        return None
    return recipe if isinstance(recipe, dict) else None


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, without damaged ones (a kill, a power cut); empty if there is no file."""
    lines = []
    for text in file.read_bytes().split(b"\n") if file.is_file() else []:
        try:
            line = plain_json(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(current_names(line))
    return lines


def environment() -> dict[str, Any]:
    """Command, versions, commit and hardware, for reproducing a result."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "command": shlex.join(Path(a).name if i == 0 else a for i, a in enumerate(sys.argv)),
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
        for line in lines_of(read_text(info)):
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that davae runs from; ``None`` for an installed package."""
    tree = Path(__file__).resolve().parents[3]
    if not (tree / ".git").exists():
        return None
    result = subprocess.run(["git", "-C", str(tree), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\]([0-9a-f]{40})(?:[/\\]|$)")


def base_facts(recipe: UpgradeRecipe, *parts: Any) -> dict[str, Any]:
    """``{"base": {"name", "revision", "commit"}}``; ``commit`` is ``None`` if unknown (folders, the embedded base)."""
    return {"base": {"name": recipe.base, "revision": recipe.base_revision, "commit": commit_of(parts)}}


def data_facts(data: DataSettings, images: ItemDataset) -> dict[str, Any]:
    """``{"data": {"name", "revision", "commit"}}``; ``commit`` is ``None`` for images that are not from the hub.

    Args:
        data: the recipe's section.
        images: a data set opened from it, possibly wrapped.
    """
    return {"data": {"name": data.path, "revision": data.revision, "commit": images.commit}}


def commit_of(parts: Iterable[Any]) -> str | None:
    """The hub commit that parts of a pipeline came from, 40 hexadecimal digits; ``None`` if not from the hub's cache.

    Parts remember the folder they were read from, and the hub's cache has a folder named after each commit.
    """
    for part in parts:
        # models have the folder in their configuration, tokenizers in an attribute
        places = (getattr(getattr(part, "config", None), "_name_or_path", None), _path_of(part))
        for place in places:
            found = _SNAPSHOT.search(str(place or ""))
            if found:
                return found.group(1)
    return None


def _path_of(part: Any) -> str | None:
    return getattr(part, "name_or_path", None)


_OPTIONAL = {
    "lpips": ("the LPIPS loss and metric", "pip install 'davae[lpips]'"),
    "torchvision": ("LPIPS", "install the build that matches your torch"),
    "efficientnet_lite_pytorch": ("feature distances without a download", "pip install 'davae[features]'"),
    "spandrel": ("upscalers to compare with", "pip install 'davae[upscalers]'"),
    "bitsandbytes": ("AdamW with 8-bit moments, weights in 8 or 4 bits", "pip install 'davae[eight-bit]'"),
    "schedulefree": ("schedule-free AdamW", "pip install 'davae[optimizers]'"),
    "prodigyopt": ("Prodigy", "pip install 'davae[optimizers]'"),
    "wandb": ("tracking with Weights & Biases", "pip install 'davae[trackers]'"),
    "trackio": ("tracking with Trackio", "pip install 'davae[trackers]'"),
    "gradio": ("davae studio, a page in the browser", "pip install 'davae[studio]'"),
}


def installation() -> dict[str, Any]:
    """:func:`environment`, the GPU, and whether the embedded base and each optional package are present."""
    return environment() | {
        "gpu": torch.accelerator.is_available(),
        "torch_cuda": torch.version.cuda,
        "embedded_base": shipped(TINY) is not None,
        "optional": {name: importlib.util.find_spec(name) is not None for name in _OPTIONAL},
    }


def _gpu(facts: Mapping[str, Any]) -> str:
    if facts["gpu"]:
        return str(facts["device"])
    if facts["torch_cuda"] is None:
        return "none, and a build of torch for the CPU"
    return (
        f"none that torch sees, with a build of torch for CUDA {facts['torch_cuda']}. If there is one, its driver is "
        "missing or too old; if there is none, `pip install torch --index-url https://download.pytorch.org/whl/cpu` "
        "takes five gigabytes less"
    )


def installation_text(facts: Mapping[str, Any]) -> str:
    """The facts of :func:`installation` as text, with how to install what is missing."""
    lines = [
        f"python {facts['python']} on {facts['platform']}; {facts['device']}, {facts['cpu_count']} cores",
        "  ".join(f"{name} {version}" for name, version in facts["packages"].items()),
        f"GPU: {_gpu(facts)}",
        f"embedded base: {'present' if facts['embedded_base'] else 'MISSING; reinstall davae'}",
    ]
    for name, (use, remedy) in _OPTIONAL.items():
        lines.append(f"{name}: {'present' if facts['optional'][name] else f'absent ({use}); {remedy}'}")
    return "\n".join(lines)
