"""The twelve classes, one scene from (class, seed), and the data set made of them."""

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from davae.data.scenes import buildings, nature, objects
from davae.data.scenes.canvas import Canvas
from davae.errors import DavaeError

_PAINTERS: dict[str, Callable[[Canvas, np.random.Generator], str]] = {
    "balloon": objects.balloon,
    "basket": objects.basket,
    "book": objects.book,
    "bridge": buildings.bridge,
    "butterfly": nature.butterfly,
    "fish": nature.fish,
    "flower": nature.flower,
    "house": buildings.house,
    "lighthouse": buildings.lighthouse,
    "sailboat": objects.sailboat,
    "tree": nature.tree,
    "windmill": buildings.windmill,
}

CLASSES: tuple[str, ...] = tuple(_PAINTERS)
"""Class names; a label is a position in this tuple."""

SEED_STRIDE = 2**32
"""Distance between the first scenes of two data set seeds; no data set is longer than this."""
_SMALLEST = 8


class SceneItem(TypedDict):
    """One item: image [3, R, R] float32 in [-1, 1], label, caption, id; nothing is ever skipped."""

    image: torch.Tensor
    label: int
    caption: str
    id: str
    skipped: list[tuple[str, str]]


def _paint(class_index: int, seed: int, resolution: int) -> tuple[Canvas, str]:
    if not 0 <= class_index < len(CLASSES):
        raise DavaeError(f"class_index is {class_index}: the procedural classes are numbered 0 to {len(CLASSES) - 1}")
    if seed < 0:
        raise DavaeError(f"seed is {seed}: a scene's seed must be 0 or larger")
    if resolution < _SMALLEST:
        raise DavaeError(f"resolution is {resolution}: a scene needs at least {_SMALLEST} pixels a side")
    canvas = Canvas(resolution)
    caption = _PAINTERS[CLASSES[class_index]](canvas, np.random.default_rng([class_index, seed]))
    return canvas, caption


def render_scene(class_index: int, seed: int, resolution: int) -> NDArray[np.uint8]:
    """Render one scene as uint8 [R, R, 3].

    The scene is a function of ``(class_index, seed)`` alone: every random choice is made independently of the
    resolution, so the same pair at two resolutions is the same picture, finer or coarser.

    Raises:
        DavaeError: for a class that does not exist, a negative seed, or a resolution under 8.
    """
    return _paint(class_index, seed, resolution)[0].to_uint8()


class ProceduralScenes(Dataset[SceneItem]):
    """Procedural illustrations, rendered on access; nothing is stored or downloaded.

    Item ``i`` shows class ``i % len(classes)``. Its scene has the seed ``seed * 2**32 + start + i``, so two
    data sets whose ``seed`` differs never share a scene, whatever their lengths: take ``seed=0`` for training
    and ``seed=1`` for a held-out set. ``start`` continues a set: ``(length=120, start=120)`` follows
    ``(length=120, start=0)``; use a multiple of the number of classes, so that the order of classes continues.

    Args:
        length: number of items.
        resolution: side of the square images in pixels.
        seed: which family of scenes.
        start: first scene of the family.
        classes: the names to show, in the order of their labels; all twelve by default.

    Raises:
        DavaeError: for an unknown class name, or numbers out of range.
    """

    def __init__(
        self, length: int, resolution: int, seed: int = 0, start: int = 0, classes: Sequence[str] = CLASSES
    ) -> None:
        for name in classes:
            if name not in CLASSES:
                raise DavaeError(f"classes: there is no procedural class {name!r}; there are {', '.join(CLASSES)}")
        if not classes:
            raise DavaeError("classes is empty: name at least one procedural class")
        if length < 0 or seed < 0 or start < 0:
            raise DavaeError(f"length={length}, seed={seed}, start={start}: none of these may be negative")
        if start + length > SEED_STRIDE:
            raise DavaeError(f"start + length is {start + length}: one seed holds 2**32 scenes; use another seed")
        if resolution < _SMALLEST:
            raise DavaeError(f"resolution is {resolution}: a scene needs at least {_SMALLEST} pixels a side")
        self.length, self.resolution, self.seed, self.start = length, resolution, seed, start
        self.classes = list(classes)

    def __len__(self) -> int:
        return self.length

    def id(self, index: int) -> str:
        """The name of scene ``index``: its class and its seed."""
        return f"procedural/{self.classes[index % len(self.classes)]}/{self._scene(index)}"

    def facts(self, index: int) -> tuple[int, str]:
        """Label and caption of scene ``index``; they do not depend on the resolution, so the smallest is painted."""
        label = index % len(self.classes)
        return label, _paint(CLASSES.index(self.classes[label]), self._scene(index), _SMALLEST)[1]

    def _scene(self, index: int) -> int:
        return self.seed * SEED_STRIDE + self.start + index

    def __getitem__(self, index: int) -> SceneItem:
        if not -self.length <= index < self.length:
            raise IndexError(f"item {index} of a data set of {self.length}")
        index %= self.length
        label = index % len(self.classes)
        name = self.classes[label]
        canvas, caption = _paint(CLASSES.index(name), self._scene(index), self.resolution)
        # Through the same 8 bits as a picture read from a file.
        pixels = torch.from_numpy(canvas.to_uint8()).permute(2, 0, 1)
        image = pixels.contiguous().to(torch.float32) / 127.5 - 1.0
        return {"image": image, "label": label, "caption": caption, "id": self.id(index), "skipped": []}
