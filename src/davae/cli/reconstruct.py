"""``davae reconstruct``."""

from pathlib import Path
from typing import Annotated

import typer

from davae.cli.options import Device, ModelDType, new_file, some_images
from davae.errors import DavaeError
from davae.runtime.console import say


def _new_picture(file: Path) -> Path:
    """Check that a file can be written, in an image format that Pillow can save."""
    from PIL import Image

    new_file(file)
    kind = Image.registered_extensions().get(file.suffix.lower())
    if kind not in Image.SAVE:
        why = f"'{file.suffix}' is no image format" if kind is None else f"{kind} can be read, not written"
        raise DavaeError(f"--out {file}: {why}; name it {file.stem}.png")
    return file


def reconstruct(
    autoencoder: Annotated[Path, typer.Argument(help="Folder of a trained AutoencoderDA, or 'tiny-upgraded'.")],
    images: Annotated[str, typer.Argument(help="A folder or data set of images.", callback=some_images)],
    resolution: Annotated[int, typer.Option(min=1, help="Side of the square crop in pixels.")] = 128,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    out: Annotated[
        Path,
        typer.Option(help="The picture: input, base enlarged, decoder alone, reconstruction.", callback=_new_picture),
    ] = Path("reconstructions.png"),
    device: Device = None,
    dtype: ModelDType = None,
) -> None:
    """Reconstruct images with an autoencoder, its base and its decoder alone."""
    from davae.training.runs.reconstruct import reconstruct_images

    say(
        reconstruct_images(autoencoder, images, resolution=resolution, count=count, out=out, device=device, dtype=dtype)
    )
