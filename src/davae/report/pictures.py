"""Image tensors to PNG files and PNG files to data URIs."""

from __future__ import annotations

import base64
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from davae.errors import DavaeError
from davae.runtime.pictures import to_bytes, upscaled

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def save_png(image: Tensor, path: Path) -> Path:
    """Write one image [3, H, W] or [1, H, W] in [-1, 1]; values outside are clipped."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise DavaeError(f"a picture must be [3, H, W] or [1, H, W] in [-1, 1], got {list(image.shape)}")
    if not image.isfinite().all():
        raise DavaeError(f"the picture for {path.name} holds NaN or infinite values")
    levels = to_bytes(image.detach().cpu()).to(torch.uint8)
    array = levels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()  # [H, W, 3]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, format="PNG", optimize=True)
    return path


def enlarged(images: Tensor, height: int, width: int) -> Tensor:
    """Images ``[B, 3, h, w]`` in [-1, 1] at ``[B, 3, height, width]``; those of that size stay as they are."""
    images = images.detach().float()
    return images if images.shape[-2:] == (height, width) else upscaled(images, (height, width))


def data_uri(run_dir: Path, file: str) -> str:
    """A PNG of the run directory as a ``data:`` address.

    Raises:
        DavaeError: the file is absent, lies outside the run directory or is not a PNG.
    """
    path = (run_dir / file).resolve()
    if not path.is_relative_to(run_dir.resolve()):
        raise DavaeError(f"the picture {file!r} lies outside the run directory {run_dir}")
    if not path.is_file():
        raise DavaeError(f"the picture {file!r} is missing from {run_dir}: run the demo again")
    content = path.read_bytes()
    if not content.startswith(_PNG_SIGNATURE):
        raise DavaeError(f"the picture {file!r} in {run_dir} is not a PNG file")
    return "data:image/png;base64," + base64.b64encode(content).decode("ascii")
