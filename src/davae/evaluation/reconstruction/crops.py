"""Crops of images that are measured separately, because high compression damages them first.

Lettering and faces are given by the user, as a folder of crops or as boxes in a file. Fine texture is found.
"""

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from davae.data import FolderSource, decode_image, image_to_tensor
from davae.errors import DavaeError
from davae.runtime.text_files import read_text
from davae.runtime.weight_files import about_file

FINE_TEXTURE = "fine texture"
SMALLEST_SIDE = 16
"""Minimum side of a measured crop in pixels; SSIM's window has 11."""
_COLUMNS = ("file", "name", "left", "top", "right", "bottom")


def busiest_crop(image: Tensor, side: int) -> tuple[slice, slice]:
    """The square with the most fine structure: largest mean absolute Laplacian.

    Args:
        image: [3, H, W].
        side: of the square in pixels; clipped to the image.

    Returns:
        Slices of rows and columns.
    """
    height, width = image.shape[-2:]
    side = min(side, height, width)
    grey = image.detach().float().cpu().mean(0)[None, None]  # [1, 1, H, W]
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).view(1, 1, 3, 3)
    energy = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="replicate"), kernel).square()
    # Roots keep one strong edge, such as a horizon, from outweighing a texture.
    sums = F.pad(energy.sqrt()[0, 0].double().cumsum(0).cumsum(1), (1, 0, 1, 0))  # of all above and left
    score = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    row, column = divmod(int(score.float().argmax()), score.shape[1])  # float32: equal squares stay equal
    return slice(row, row + side), slice(column, column + side)


def fine_texture(images: Tensor) -> Callable[[Tensor], Tensor]:
    """Find the busiest square of each of ``images`` ``[B, 3, H, W]``, a quarter of the shorter side, at least 16 px.

    Returns:
        A function that crops these squares, ``[B, 3, S, S]``, from the images or their reconstructions.
    """
    side = max(min(images.shape[-2:]) // 4, SMALLEST_SIDE)
    places = [busiest_crop(image, side) for image in images]
    return lambda made: torch.stack(
        [image[:, rows, columns] for image, (rows, columns) in zip(made, places, strict=True)]
    )


def folder_crops(folder: Path, unit: int) -> Iterator[Tensor]:
    """Images of a folder one by one, ``[1, 3, H, W]``, never resized: sides cut to multiples of ``unit``.

    Raises:
        DavaeError: an image is smaller than ``unit``.
    """
    source = FolderSource(folder, split=None)
    for index in range(len(source)):
        with about_file(folder / source.id(index)), source.open(index) as file:
            image = whole_positions(decode_image(file), unit)
        yield image


def whole_positions(image: Image.Image, unit: int) -> Tensor:
    """An image as ``[1, 3, H, W]`` in [-1, 1], its sides cut around the middle to multiples of ``unit``, never resized.

    Raises:
        DavaeError: it is smaller than ``unit``, the pixels of one latent position.
    """
    height, width = (side // unit * unit for side in (image.height, image.width))
    if not height or not width:
        raise DavaeError(f"{image.width} x {image.height} pixels, less than the {unit} of one latent position")
    top, left = (image.height - height) // 2, (image.width - width) // 2
    return image_to_tensor(image)[None, :, top : top + height, left : left + width]


@dataclass(frozen=True)
class Box:
    """A part of an image file, in pixels; ``right`` and ``bottom`` are exclusive."""

    file: Path
    left: int
    top: int
    right: int
    bottom: int

    def cut(self, unit: int) -> Tensor:
        """``[1, 3, H, W]``, never resized: grown around its middle to multiples of ``unit``, inside the image.

        Raises:
            DavaeError: the box reaches out of the image, or the image has no room for it.
        """
        with about_file(self.file):
            image = image_to_tensor(decode_image(self.file))  # [3, H, W]
        height, width = image.shape[-2:]
        if self.right > width or self.bottom > height:
            raise DavaeError(
                f"{self.file} has {width} x {height} pixels, and a box ends at {self.right}, {self.bottom}"
            )
        rows = _grown(self.top, self.bottom, height, unit)
        columns = _grown(self.left, self.right, width, unit)
        if rows is None or columns is None:
            raise DavaeError(
                f"{self.file} has {width} x {height} pixels: no room for a box of multiples of {unit}, the pixels of "
                "one latent position"
            )
        return image[None, :, rows, columns]


def read_boxes(file: str | Path) -> dict[str, list[Box]]:
    """Boxes by name, from a table of comma-separated values.

    Its first line names the columns ``file,name,left,top,right,bottom``; other columns are ignored. Files are
    looked for beside the table; ``name`` is what the box shows, such as ``lettering``.

    Raises:
        DavaeError: the table cannot be read, lacks a column, names a file that is not there, or a box is empty.
    """
    path = Path(file)
    found: dict[str, list[Box]] = {}
    try:
        table = csv.DictReader(io.StringIO(read_text(path), newline=""))
        missing = [name for name in _COLUMNS if name not in (table.fieldnames or ())]
        if missing:
            raise DavaeError(f"{path} has no column '{missing[0]}': its first line is {','.join(_COLUMNS)}")
        for row in table:
            box = _box(row, path, table.line_num)
            found.setdefault(row["name"].strip(), []).append(box)
    except (OSError, csv.Error) as error:
        raise DavaeError(f"cannot read the boxes in {path}: {error}") from error
    if not found:
        raise DavaeError(f"{path} holds no box")
    return found


def _box(row: dict[str, str], table: Path, line: int) -> Box:
    where = f"{table}, line {line}"
    try:
        left, top, right, bottom = (int(row[side]) for side in _COLUMNS[2:])
    except (TypeError, ValueError) as error:
        raise DavaeError(f"{where}: left, top, right and bottom must be whole numbers of pixels") from error
    if not (row["name"] or "").strip():
        raise DavaeError(f"{where}: no name: say what the box shows, such as lettering")
    if not (0 <= left < right and 0 <= top < bottom):
        raise DavaeError(f"{where}: the box from {left}, {top} to {right}, {bottom} is empty")
    file = table.parent / row["file"]
    if not file.is_file():
        raise DavaeError(f"{where}: {file} is no file (files are looked for beside the table)")
    return Box(file, left, top, right, bottom)


def _grown(low: int, high: int, limit: int, unit: int) -> slice | None:
    """``[low, high)`` grown evenly to a multiple of ``unit`` and moved inside ``[0, limit)``; none without room."""
    length = max(-(-(high - low) // unit) * unit, -(-SMALLEST_SIDE // unit) * unit)
    if length > limit:
        length = limit // unit * unit  # the largest multiple that fits the image
    if length < unit:
        return None
    start = min(max((low + high - length) // 2, 0), limit - length)
    return slice(start, start + length)
