"""Generation of many images, divided among processes; it can be stopped and continued at any time.

Image ``i`` is the file ``images/000000i.png``. Files are written atomically, so every existing file is whole, and there
is no other state. An image depends on its number and the settings only: on its seed ``seed + i``, and on its batch,
which is determined by number, not by what is missing.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from davae.data import image_to_tensor
from davae.data.cache import plain_config, value_hash, weights_hash
from davae.errors import DavaeError
from davae.evaluation.generation.prompts import PromptSet
from davae.pipelines.sampling.generate import generate_batch
from davae.runtime.atomic_files import atomic_json, atomic_write, make_folder
from davae.runtime.devices import timed
from davae.runtime.pictures import save_image
from davae.runtime.text_files import read_object

_SETTINGS, _TIMES = "settings.json", "seconds.json"
Paint = Callable[[range], list[Image.Image]]
"""Makes the images of these numbers; images at the end may be left out."""
_SAYS_NOTHING = ("transformers_version", "torch_dtype", "dtype", "name_or_path")


@dataclass(frozen=True)
class RunSettings:
    """Everything that determines the images; it is fixed for a folder.

    Attributes:
        pipeline: its name or folder, for readers only; it is identified by ``weights``.
        weights: :func:`contents_hash` of the pipeline.
        prompts: from `PromptSet.describe`.
        seed: of image 0; image ``i`` has ``seed + i``.
        batch: images per call of the pipeline.
        steps, guidance, height, width: the pipeline's own by default.
        dtype: of the pipeline.
    """

    pipeline: str
    prompts: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    batch: int = 1
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    weights: str = ""

    @classmethod
    def differing(cls, found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
        """The first difference of two settings, for an error; ``None`` if they agree."""
        if "weights" not in found:
            return "its images were made by an earlier davae, which did not note the weights"
        if found["weights"] != wanted["weights"]:
            return f"its images are of other weights than {wanted['pipeline']} has now"
        for key, value in wanted.items():
            if key != "pipeline" and found.get(key) != value:
                return f"it was started with {key} = {found.get(key)!r}, not {value!r}"
        return None


def contents_hash(pipe: DiffusionPipeline) -> str:
    """SHA-256 of a pipeline's class, weights, configurations and vocabularies, independent of its path."""
    parts: dict[str, Any] = {"class": type(pipe).__name__, "options": plain_config(pipe.config)}
    for name, part in pipe.components.items():
        config: Any = getattr(part, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else config
        vocabulary = part.get_vocab() if hasattr(part, "get_vocab") else None
        parts[name] = [
            type(part).__name__,
            weights_hash(part) if isinstance(part, nn.Module) else vocabulary,
            {k: v for k, v in plain_config(config or {}).items() if k not in _SAYS_NOTHING},
        ]
    return value_hash(parts)


class ImageRun:
    """The folder of a run.

    Args:
        folder: created if absent.
        settings: of this run.

    Raises:
        DavaeError: the folder has images of other weights or settings; the first difference is named.
    """

    def __init__(self, folder: str | Path, settings: RunSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        make_folder(self.folder / "images")
        file = self.folder / _SETTINGS
        wanted = asdict(settings)
        if file.is_file():
            differing = settings.differing(read_object(file), wanted)
            if differing is not None:
                raise DavaeError(
                    f"{self.folder} cannot be continued: {differing}. Give another --out, or delete the folder"
                )
            return
        atomic_json(file, wanted)

    def describe(self) -> dict[str, Any]:
        """For the JSON: the settings."""
        return asdict(self.settings)

    def path(self, index: int) -> Path:
        """File of an image."""
        return self.folder / "images" / f"{index:07d}.png"

    def missing(self, count: int) -> list[int]:
        """Numbers of the missing images among the first ``count``."""
        there = {entry.name for entry in os.scandir(self.folder / "images")}
        return [i for i in range(count) if self.path(i).name not in there]

    def share_missing(self, count: int, rank: int, world: int) -> list[int]:
        """The part of :meth:`missing` for process ``rank`` of ``world``: batches are assigned in turn."""
        return [i for i in self.missing(count) if i // self.settings.batch % world == rank]

    def size(self) -> tuple[int, int]:
        """Height and width of the images; the first one must exist."""
        height, width = self._read(0).shape[-2:]
        return height, width

    def make(
        self, pipe: DiffusionPipeline, prompts: PromptSet, count: int, *, rank: int = 0, world: int = 1
    ) -> Iterator[int]:
        """:meth:`fill` with images of a pipeline.

        Args:
            pipe: the pipeline.
            prompts: subjects of the images.
            count, rank, world: as for :meth:`fill`.
        """

        def paint(indices: range) -> list[Image.Image]:
            return generate_batch(
                pipe,
                [prompts.subject(i) for i in indices],
                [self.settings.seed + i for i in indices],
                steps=self.settings.steps,
                guidance=self.settings.guidance,
                height=self.settings.height,
                width=self.settings.width,
            )

        return self.fill(paint, count, rank=rank, world=world)

    def fill(self, paint: Paint, count: int, *, rank: int = 0, world: int = 1) -> Iterator[int]:
        """Make the missing images of this process's share; yields the number of each image once it is on disk.

        An interrupted batch is made again as a whole, and only its missing images are written, so the results are
        those of an uninterrupted run, bit for bit. The first process notes the seconds of its batches.

        Args:
            paint: makes a batch.
            count: images of the whole run; a larger number than before extends the run.
            rank, world: number of this process, and of all processes.
        """
        size, seconds = self.settings.batch, list[float]()
        try:
            for block in sorted({i // size for i in self.share_missing(count, rank, world)}):
                # The last batch is always filled up: a run that is extended later meets the same batches.
                indices = range(block * size, (block + 1) * size)
                images, taken = timed(partial(paint, indices))
                seconds.append(taken / len(images))
                for index, image in zip(indices, images):
                    if index < count and not self.path(index).exists():
                        save_image(image, self.path(index))
                        yield index
        finally:
            if seconds and rank == 0:
                atomic_json(self.folder / _TIMES, {"seconds": [*self._times(), *seconds]})

    def seconds(self) -> float | None:
        """Median of the seconds per image over the batches that were noted; None if there are none."""
        times = self._times()
        return median(times) if times else None

    def _times(self) -> list[float]:
        file = self.folder / _TIMES
        return list(read_object(file)["seconds"]) if file.is_file() else []

    def batches(self, count: int, *, size: int = 32) -> Iterator[Tensor]:
        """The first ``count`` images in order, ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            DavaeError: an image is missing or cannot be read.
        """
        for start in range(0, count, size):
            yield self.images(range(start, min(start + size, count)))

    def images(self, indices: range) -> Tensor:
        """The images of these numbers, ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            DavaeError: as for :meth:`batches`.
        """
        return torch.stack([self._read(i) for i in indices])

    def _read(self, index: int) -> Tensor:
        try:
            with Image.open(self.path(index)) as image:
                return image_to_tensor(image)
        except OSError as error:
            raise DavaeError(
                f"image {index} of the run cannot be read ({error}): delete {self.path(index)} if it is there, and "
                "run the same command again"
            ) from error


def write_geneval_folder(run: ImageRun, prompts: PromptSet, count: int, out: str | Path) -> Path:
    """Copy images to the layout of GenEval's scorer: ``00000/metadata.jsonl`` and ``00000/samples/00000.png``."""
    out = Path(out)
    for index in range(count):
        prompt, sample = index % len(prompts.subjects), index // len(prompts.subjects)
        folder = out / f"{prompt:05d}"
        if sample == 0:
            atomic_write(folder / "metadata.jsonl", json.dumps(prompts.metadata[prompt]))
        atomic_write(folder / "samples" / f"{sample:05d}.png", run.path(index).read_bytes())
    return out
