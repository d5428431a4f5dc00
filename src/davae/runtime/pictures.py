"""Images as files, and picture sheets that show many of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from davae.errors import DavaeError
from davae.runtime.atomic_files import atomic_file
from davae.runtime.processes import gathered_in_first, is_first, share

PICTURES = 8  # images in a row of a validation picture
_GAP = 2  # pixels between tiles
_LINE = 12  # pixels of a line of text


def to_bytes(images: Tensor) -> Tensor:
    """``[..., H, W]`` in [-1, 1], clamped, to the 8-bit values 0..255 that an image file holds, as float32."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round()


def as_picture(image: Tensor) -> Image.Image:
    """``[3, H, W]`` or ``[1, H, W]`` in [-1, 1], clamped, as an RGB picture."""
    levels = to_bytes(image.detach().cpu()).to(torch.uint8)
    return Image.fromarray(levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())  # [H, W, 3]


def image_grid(rows: list[Tensor], labels: Sequence[Sequence[str]] = ()) -> Image.Image:
    """Tile rows of ``[N, 3, h, w]`` images in [-1, 1] into one picture.

    Rows may differ in resolution; smaller images are enlarged to the largest side by nearest neighbour, which shows
    their pixels as they are.

    Args:
        rows: the images.
        labels: of the images of each row, written below them and cut to their width; rows without any have no text.
    """
    side = max(row.shape[-1] for row in rows)
    tiles = []
    texts: list[tuple[int, int, str]] = []
    height = 0
    for number, row in enumerate(rows):
        row = row.detach().float().cpu()
        if row.shape[-1] != side:
            row = F.interpolate(row, size=(side, side), mode="nearest-exact")
        own = labels[number][: len(row)] if number < len(labels) else []
        texts += [(i * (side + _GAP), height + row.shape[-2], text[: max(1, side // 6)]) for i, text in enumerate(own)]
        padded = F.pad(row, (0, _GAP, 0, _LINE if own else _GAP), value=1.0)
        tiles.append(torch.cat(list(padded), dim=2))  # [3, side, N * side]
        height += padded.shape[-2]
    width = max(t.shape[2] for t in tiles)
    whole = torch.cat([F.pad(t, (0, width - t.shape[2]), value=1.0) for t in tiles], dim=1)
    picture = as_picture(whole)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for left, top, text in texts:
        draw.text((left, top), text.replace("\n", " "), fill="black", font=font)
    return picture


def save_image(image: Image.Image, path: Path, **options: Any) -> None:
    """Write an image atomically, in the format of its suffix; its folder is created if absent.

    Raises:
        DavaeError: the suffix is no image format.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise DavaeError(f"{path}: no kind of picture ends in '{path.suffix}'; name it {path.stem}.png")
    with atomic_file(path) as partial:
        image.save(partial, format=kind, **options)


def save_shared_rows(path: Path, rows: dict[str, Tensor], count: int, *, at_most: int = PICTURES) -> None:
    """:func:`save_rows` of the first ``at_most`` of ``count`` images; every rank passes its share of each row."""
    mine = share(count)
    shown = {}
    for name, row in rows.items():
        own = [image.float().cpu() if i < at_most else None for i, image in zip(mine, row, strict=True)]
        found = [image for image in gathered_in_first(own, count) if image is not None]
        if is_first():
            shown[name] = torch.stack(found)
    if is_first():
        save_rows(path, shown)


def save_rows(path: Path, rows: dict[str, Tensor], labels: Sequence[Sequence[str]] = ()) -> None:
    """Write an :func:`image_grid` with one row per entry; the names of the rows are stored in the PNG's text."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Rows", " | ".join(rows))
    save_image(image_grid(list(rows.values()), labels), path, pnginfo=info)
