"""The files in a run directory from which its report is built.

* ``summary.json``: all numbers, a :class:`Summary`.
* ``figures.json``: what is shown beside the numbers, a :class:`Figures`; pictures are files next to it,
  arrays lie in ``figures.safetensors``.
* the ``metrics.jsonl`` files that ``figures.json`` names, one JSON object per logged step.
"""

from collections.abc import Mapping
from contextlib import suppress
from functools import reduce
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from davae.errors import DavaeError
from davae.evaluation.metrics.names import current_names
from davae.pipelines.saving.publishing import public_command, public_text, public_values
from davae.runtime.atomic_files import atomic_write
from davae.runtime.text_files import plain_json, read_json

Number = TypeVar("Number", int, float)
Scalar = str | int | float | bool | None
Public = Annotated[str, AfterValidator(public_text)]
"""Reports are shared: paths are cut to their last part."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class _File(_Record):
    """A record stored as one JSON file in a run directory."""

    @classmethod
    def file_name(cls) -> str:
        """Name of the file below the run directory."""
        raise NotImplementedError

    def write(self, run_dir: Path | str) -> Path:
        """Write the file atomically; returns its path."""
        path = Path(run_dir) / self.file_name()
        atomic_write(path, self.model_dump_json(indent=2) + "\n")
        return path

    @classmethod
    def read(cls, run_dir: Path | str) -> Self:
        """Read and check the file.

        Raises:
            DavaeError: it is absent, is not JSON, or a key is missing, unknown or of the wrong type.
        """
        path = Path(run_dir) / cls.file_name()
        if not path.is_file():
            raise DavaeError(
                f"{path} does not exist: `davae report` rebuilds that of a finished `davae demo`. `davae studio` "
                "shows the curves and pictures of a training, from its metrics.jsonl and samples/"
            )
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "the top level"
            more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
            raise DavaeError(f"{path}: {place}: {first['msg']}{more}") from error


class EachWay(_Record, Generic[Number]):
    """One number for the base, the base at full resolution (native), the base decoded larger by the upgrade's joint
    decoder alone (None in earlier runs), and the upgraded pipeline."""

    base: Number
    native: Number
    decoder_alone: Number | None = None
    upgraded: Number


class Reconstruction(_Record):
    """Autoencoder figures on images that were held out of the training, at full resolution."""

    psnr_upgraded: float
    """dB."""
    psnr_base_upscaled: float
    """dB, of the base's own reconstruction after bicubic upscaling."""
    psnr_decoder_alone: float | None = None
    """dB, of the joint decoder on the base latent, without details."""
    psnr_base_native: float | None = None
    """dB, of the base's reconstruction at full resolution, from more positions."""
    psnr_reduced: float | None = None
    """dB, of the image reduced to the base's size and enlarged, without an autoencoder."""
    ssim_upgraded: float | None = None
    ssim_base_upscaled: float | None = None
    ssim_decoder_alone: float | None = None
    ssim_base_native: float | None = None
    ssim_reduced: float | None = None
    others: dict[Public, dict[str, float]] = {}
    """The same figures by name of further ways: the upgrade that comes with davae, upscalers of the base's image."""
    images: int | None = None
    """Number of compared images."""


class Generation(_Record):
    """Distance of generated images from real ones at full resolution: sliced Wasserstein, finest level."""

    swd_finest_upgraded: float
    swd_finest_base_upscaled: float
    swd_finest_decoder_alone: float | None = None
    """Of the base's own samples, decoded larger by the joint decoder without details."""
    swd_finest_real: float | None = None
    """The same distance between two sets of real images, as a lower bound."""
    swd_levels_upgraded: list[float] = []
    """All pyramid levels, finest first."""
    swd_levels_base_upscaled: list[float] = []
    swd_levels_decoder_alone: list[float] = []
    swd_levels_others: dict[Public, list[float]] = {}
    """By name of further ways, from the same seeds."""
    preview_drift: float | None = None
    """Root mean square difference of the samples' base previews from the base's own samples of the same seeds, images
    in [-1, 1]."""
    seeds_apart: float | None = None
    """The same between the base's samples of one class from two seeds."""
    images: int | None = None
    """Generated images in each set."""

    @model_validator(mode="before")
    @classmethod
    def _earlier_names(cls, values: Any) -> Any:
        return current_names(values) if isinstance(values, dict) else values


class Alignment(_Record):
    """How the detail latent relates to the base latent."""

    base_latents_equal: bool
    """Whether the base part of every latent is bit-equal to the base VAE's own."""
    loss: float | None = None
    """Alignment loss on held-out images."""
    loss_start: float | None = None
    """Mean training loss of alignment in the first line of the log."""
    linear_probe_base: float | None = None
    """Accuracy of a linear probe of classes on the base latent, in [0, 1]."""
    linear_probe_detail: float | None = None


class WarmStart(_Record):
    """The widened transformer against the original, before its first training step."""

    max_base_difference: float
    max_detail_output: float


class Summary(_File):
    """All numbers of a run; ``summary.json``."""

    title: str
    created: str
    """ISO 8601."""
    command: str
    """The command of the run."""
    hardware: dict[str, Scalar]
    image_size: EachWay[int]
    """Side in pixels."""
    tokens: EachWay[int]
    """Of the transformer; without one, positions of the latent."""
    flops_per_image: EachWay[float]
    """Of one image from noise to pixels, with guidance as sampled; without a transformer, encoded and decoded."""
    seconds_per_image: EachWay[float]
    reconstruction: Reconstruction
    generation: Generation | None = None
    alignment: Alignment
    warm_start: WarmStart | None = None
    not_generated: Public = ""
    """Why nothing was generated, in one sentence."""
    unknown_classes: list[Public] = []
    """Classes of the images that the base pipeline does not know."""
    unlabelled: bool = False
    """Whether the samples are of no class, since the base knows none of the images' classes."""
    quick: bool = False
    """Whether the run was cut to a few steps."""
    phases: dict[str, float] = {}
    """Seconds by phase."""
    wall_seconds: float
    peak_memory_bytes: int
    settings: dict[str, JsonValue] = {}
    """May be nested; shown flat with dotted names."""
    skipped: list[tuple[str, str]] = []
    """Images left out: name and reason."""

    @model_validator(mode="before")
    @classmethod
    def _public(cls, values: Any) -> Any:
        """Reports are shared: paths are cut to their last part."""
        if not isinstance(values, dict):
            return values
        texts = {
            key: public_values(values[key]) for key in ("title", "hardware", "settings", "skipped") if key in values
        }
        command = values.get("command")
        return values | texts | ({"command": public_command(command)} if isinstance(command, str) else {})

    @classmethod
    def file_name(cls) -> str:  # noqa: D102
        return "summary.json"


_DECISIVE = (
    *("base", "data.path", "data.resolution", "autoencoder.model.scale", "autoencoder.model.detail_channels"),
    *(f"autoencoder.loop.{key}" for key in ("steps", "batch_size", "validation_images")),
    *(f"diffusion.loop.{key}" for key in ("steps", "batch_size", "validation_images")),
)
"""Settings that decide what a demo reaches in which time."""


def usual_run(settings: Mapping[str, Any]) -> Summary | None:
    """The recorded run with the same decisive settings; None if none was recorded.

    Each file of the folder ``usual`` is the ``summary.json`` of one.
    """

    def decisive(values: Mapping[str, Any]) -> list[Any]:
        return [reduce(lambda inner, name: inner[name], key.split("."), values) for key in _DECISIVE]

    for file in sorted((files("davae.report") / "usual").iterdir(), key=lambda file: file.name):
        run = Summary.model_validate(plain_json(file.read_text(encoding="utf-8")))
        with suppress(KeyError, TypeError):  # of a run without a stage, or of other settings altogether
            if decisive(run.settings) == decisive(settings):
                return run
    return None


class Picture(_Record):
    """One PNG file."""

    file: str
    """Relative to the run directory, inside it."""
    alt: Public
    """Alternative text of the picture."""
    label: Public = ""
    """A few words below the picture."""


class PictureRow(_Record):
    """Pictures to be compared with each other, and magnified parts of the same."""

    caption: Public = ""
    pictures: list[Picture] = Field(min_length=1)
    zooms: list[Picture] = []


class Section(_Record):
    """A heading, what to look at, and rows of pictures."""

    id: str = Field(pattern=r"^[a-z][a-z0-9-]*$")
    title: str
    text: str = ""
    rows: list[PictureRow] = []
    slider: tuple[int, int] | None = None
    """Positions in a row of the two pictures that a slider compares."""


class Curve(_Record):
    """The losses of one stage."""

    title: str
    file: str
    """A metrics.jsonl, relative to the run directory."""
    terms: list[str] | None = None
    """Values to draw; by default all but learning rates, times and norms."""
    text: str = ""


class LatentMap(_Record):
    """Points in the plane, coloured by class."""

    title: str
    key: str
    """Tensor [N, 2] in ``figures.safetensors``; the classes are its tensor ``labels``."""
    note: str = ""


class Spectrum(_Record):
    """One line of a spectrum plot; tensors ``frequency.KEY`` and ``power.KEY`` in ``figures.safetensors``."""

    label: str
    group: Literal["images", "latents"]
    key: str


class Figures(_File):
    """What the report shows beside the numbers; ``figures.json``."""

    sections: list[Section] = []
    curves: list[Curve] = []
    classes: list[str] = []
    maps: list[LatentMap] = []
    map_method: str = "PCA"
    spectra: list[Spectrum] = []

    @classmethod
    def file_name(cls) -> str:  # noqa: D102
        return "figures.json"


TENSOR_FILE = "figures.safetensors"
"""Arrays that ``figures.json`` refers to."""
