"""Trackers of a run, through accelerate: named after the run, with its settings, its pictures, and resumed with it."""

from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image

from davae.errors import DavaeError
from davae.recipes.loop import LoopSettings
from davae.recipes.read import flatten
from davae.runtime.atomic_files import atomic_write
from davae.runtime.text_files import read_text

_FOLDER = "tracking"


class Trackers:
    """The trackers of ``loop.report_to``; with none, or in any but the first process, every method does nothing.

    Args:
        loop: names them.
        out: the run directory. Its folder ``tracking`` holds what is logged on this machine, and the run's id.
        recipe: the resolved recipe as plain values, shown as the run's configuration.
        section: the recipe's section that has ``loop``, for errors.
        enabled: whether this is the first process.
    """

    def __init__(self, loop: LoopSettings, out: Path, recipe: dict[str, Any], section: str, *, enabled: bool) -> None:
        self.loop, self.out, self.recipe, self.section = loop, out, recipe, section
        self.enabled = enabled
        self._started: list[GeneralTracker] = []

    def start(self, step: int) -> None:
        """Start them, or continue what they have of this run; what they logged after ``step`` is logged again.

        Raises:
            DavaeError: one does not start (no login, no network); the message has its reason.
        """
        for name in self.loop.report_to if self.enabled else ():
            try:
                tracker = self._make(name, step)
                tracker.start()
                if name == "tensorboard":  # its table of hyperparameters would be a run of its own at each start
                    text = "\n".join(f"    {key}: {value}" for key, value in flatten(self.recipe))
                    tracker.log({"configuration": text or "    none"}, step=step)
                else:
                    tracker.store_init_configuration(_plain(flatten(self.recipe)))
            except Exception as error:
                key = f"{self.section}.loop.report_to".lstrip(".")
                reason = " ".join(str(error).split()) or type(error).__name__
                raise DavaeError(
                    f"{key}: {name} does not start ({reason}). Log in or work offline as its documentation says, or "
                    f"leave it out of {key}; metrics.jsonl is written in any case"
                ) from error
            self._started.append(tracker)

    def log(self, values: dict[str, float], step: int) -> None:
        """Log scalars by name."""
        for tracker in self._started:
            tracker.log(values, step=step)

    def pictures(self, folder: Path, step: int) -> None:
        """Log the pictures ``step-<step>*.png`` of a folder, where a tracker takes pictures."""
        files = sorted({*folder.glob(f"step-{step}.png"), *folder.glob(f"step-{step}-*.png")}) if self._started else []
        for file in files:
            name = "/".join(["samples", *file.stem.split("-")[2:]])
            for tracker in self._started:
                _log_picture(tracker, name, file, step)

    def finish(self) -> None:
        """Close them. accelerate's ``end_training`` would end the process group that later stages need."""
        for tracker in self._started:
            tracker.finish()
        self._started = []

    def _make(self, name: str, step: int) -> GeneralTracker:
        kind = LOGGER_TYPE_TO_CLASS[name]
        if name == "tensorboard":  # hides what was logged after the checkpoint
            return kind(_FOLDER, str(self.out), purge_step=step + 1 if step else None)
        project, called = self.loop.tracker_project_name, self.loop.tracker_run_name or _called(self.out)
        options: dict[str, Any] = {}
        if name == "wandb":
            options = {"name": called, "id": self._id(), "resume": "allow", "dir": str(self.out / _FOLDER)}
        elif name == "trackio":  # which knows runs by their names alone
            options = {"name": f"{called}-{self._id()[:4]}", "resume": "allow"}
        elif kind.requires_logging_directory:
            return kind(project, str(self.out / _FOLDER))
        return kind(project, **options)

    def _id(self) -> str:
        """The run's id, the same when it resumes."""
        file = self.out / _FOLDER / "id"
        if not file.is_file():
            atomic_write(file, uuid4().hex)
        return read_text(file).strip()


def _called(out: Path) -> str:
    """A run's name: its folder, with the folder above unless that is ``runs``."""
    above = out.resolve().parent.name
    return out.resolve().name if above in ("runs", "") else f"{above}/{out.resolve().name}"


def _plain(values: list[tuple[str, object]]) -> dict[str, Any]:
    """Values that all trackers take as hyperparameters; others as text."""
    return {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in values}


def _log_picture(tracker: GeneralTracker, name: str, file: Path, step: int) -> None:
    if tracker.name == "trackio":
        import trackio

        tracker.log({name: trackio.Image(str(file))}, step=step)
        return
    if not hasattr(tracker, "log_images"):
        return
    with Image.open(file) as picture:
        picture.load()
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(picture.convert("RGB"))[None]}, step=step, dataformats="NHWC")
    else:
        tracker.log_images({name: [picture]}, step=step)
