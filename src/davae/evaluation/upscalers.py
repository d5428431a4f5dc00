"""Upscalers by name: what makes a large image of the base's small one without knowing its latent."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from davae.bases.open import load_base
from davae.data.cache import plain_config, value_hash, weights_hash
from davae.errors import DavaeError, first_line
from davae.pipelines.saving.opening import pipeline_place
from davae.runtime.resizing import resize_bicubic
from davae.runtime.text_files import read_object
from davae.runtime.weight_files import read_finite

PIPELINES = ("StableDiffusionUpscalePipeline", "StableDiffusionLatentUpscalePipeline")
"""Upscaling pipelines of diffusers: four times and twice as large."""
_WANTED = (
    "give a .safetensors file of a model that spandrel knows, such as an ESRGAN, or the folder of a pipeline of "
    f"diffusers, {' or '.join(PIPELINES)}"
)


class Upscaler(ABC):
    """Enlarges images by a fixed factor, as often as it takes to reach a size.

    Attributes:
        place: file or folder, as given.
        kind: architecture or class.
        parameters: their number.
        factor: of one application, per side.
        weights: SHA-256 of the weights, independent of ``place``.
    """

    place: str
    kind: str
    parameters: int
    factor: int
    weights: str

    @torch.no_grad()
    def __call__(
        self, images: Tensor, size: tuple[int, int], *, seeds: Sequence[int], texts: Sequence[str] | None = None
    ) -> Tensor:
        """Images ``[B, 3, h, w]`` in [-1, 1] enlarged to ``size`` (height, width), float32 on the CPU.

        What comes out larger is reduced bicubically, with antialiasing.

        Args:
            images: at base resolution, on any device.
            size: of the result.
            seeds: one per image, for upscalers that draw noise.
            texts: what the images show, for upscalers that read prompts; without them they run without guidance.

        Raises:
            DavaeError: the images do not suit the upscaler.
        """
        made = images.float().clamp(-1, 1)
        while made.shape[-2] < size[0] or made.shape[-1] < size[1]:
            made = self._enlarged(made, seeds, texts).float().clamp(-1, 1)
        return resize_bicubic(made, *size).clamp(-1, 1).cpu()

    @abstractmethod
    def _enlarged(self, images: Tensor, seeds: Sequence[int], texts: Sequence[str] | None) -> Tensor:
        """``[B, 3, factor h, factor w]`` of ``[B, 3, h, w]``, both in [-1, 1]."""

    @property
    def title(self) -> str:
        """Its kind and place, for readers."""
        return f"{self.kind} ({self.place})"

    def describe(self) -> dict[str, Any]:
        """For the JSON: what it is, its factor and the hash of its weights."""
        return {"place": self.place, "kind": self.kind, "factor": self.factor, "weights_sha256": self.weights}


class SpandrelUpscaler(Upscaler):
    """A model that spandrel knows by its weights' names and shapes, from a ``.safetensors`` file; float32.

    Raises:
        DavaeError: the ``upscalers`` extra is not installed, or the file is damaged, holds weights of no architecture
            known to spandrel, or of a model that does not enlarge colour images.
    """

    def __init__(self, file: Path, device: str) -> None:
        try:
            import spandrel
        except (ImportError, RuntimeError) as error:  # torchvision of another torch is a RuntimeError
            raise DavaeError(
                f"{file} is opened by spandrel, which cannot be imported ({first_line(error)}): "
                "pip install 'davae[upscalers]'"
            ) from error
        weights = read_finite(file)
        try:
            model = spandrel.ModelLoader(device=device).load_from_state_dict(dict(weights))
        except (spandrel.UnsupportedModelError, RuntimeError, KeyError, ValueError) as error:
            raise DavaeError(
                f"{file} is no upscaler that spandrel {spandrel.__version__} knows ({first_line(error)}): {_WANTED}"
            ) from error
        if not isinstance(model, spandrel.ImageModelDescriptor) or model.scale < 2 or model.input_channels != 3:
            raise DavaeError(f"{file} holds a {model.architecture.name} that does not enlarge colour images: {_WANTED}")
        self.place, self.factor, self._model = str(file), int(model.scale), model.float().eval()
        self.weights, self.kind = weights_hash(model.model), model.architecture.name
        self.parameters = _count(model.model)

    def _enlarged(self, images: Tensor, seeds: Sequence[int], texts: Sequence[str] | None) -> Tensor:
        singly = [self._model(image[None].to(self._model.device) / 2 + 0.5) for image in images]
        return torch.cat(singly) * 2 - 1


class PipelineUpscaler(Upscaler):
    """One of :data:`PIPELINES`, in float32, with its own defaults.

    Raises:
        DavaeError: see :func:`davae.bases.open.load_base`.
    """

    def __init__(self, folder: str, device: str) -> None:
        self._pipe: Any = load_base(folder, dtype=torch.float32).to(device)
        self._pipe.set_progress_bar_config(disable=True)
        self.place, self.kind = folder, type(self._pipe).__name__
        self.factor = 4 if self.kind == PIPELINES[0] else 2
        parts: dict[str, Any] = {
            name: weights_hash(part) if isinstance(part, nn.Module) else plain_config(getattr(part, "config", {}))
            for name, part in self._pipe.components.items()
        }
        self.weights = value_hash(parts)
        self.parameters = sum(_count(part) for part in self._pipe.components.values() if isinstance(part, nn.Module))

    def _enlarged(self, images: Tensor, seeds: Sequence[int], texts: Sequence[str] | None) -> Tensor:
        unguided: dict[str, Any] = {} if texts else {"guidance_scale": 1.0}
        made: Tensor = self._pipe(
            prompt=list(texts or [""] * len(images)),
            image=images / 2 + 0.5,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
            **unguided,
        ).images
        return made * 2 - 1


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def check_upscaler(name: str, place: str) -> None:
    """Check that there is an upscaler, before any work; names on the hub are looked up later.

    Args:
        name: of its row, for the error.
        place: as for :func:`open_upscaler`.

    Raises:
        DavaeError: a file of another kind, among them pickles, or a folder of something else.
    """
    path = Path(place)
    if path.suffix in _PICKLES:
        raise DavaeError(
            f"upscaler '{name}': {place} is a pickle, which can run code when it is read. Look for the same model as "
            ".safetensors; where you trust the file, convert it once in Python: "
            "`from spandrel import ModelLoader; from safetensors.torch import save_file; "
            f"save_file(ModelLoader().load_from_file({place!r}).model.state_dict(), {path.stem + '.safetensors'!r})`"
        )
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise DavaeError(f"upscaler '{name}': there is no file {place}")
        if path.suffix != ".safetensors":
            raise DavaeError(f"upscaler '{name}': {place} is no .safetensors file; {_WANTED}")
        return
    folder = Path(pipeline_place(place))
    if folder.is_dir():
        _check_class(name, place, str(read_object(folder / "model_index.json").get("_class_name")))


_PICKLES = (".pth", ".pt", ".ckpt", ".bin")


def _check_class(name: str, place: str, kind: str) -> None:
    if kind not in PIPELINES:
        raise DavaeError(f"upscaler '{name}': {place} holds a {kind}; {_WANTED}")


def open_upscaler(name: str, place: str, device: str = "cpu") -> Upscaler:
    """Open an upscaler.

    Args:
        name: of its row, for errors.
        place: a ``.safetensors`` file for spandrel, or a folder of one of :data:`PIPELINES`, or its name on the hub.
        device: where it runs.

    Raises:
        DavaeError: see :func:`check_upscaler`, :class:`SpandrelUpscaler` and :class:`PipelineUpscaler`.
    """
    check_upscaler(name, place)
    if Path(place).suffix == ".safetensors":
        return SpandrelUpscaler(Path(place), device)
    found = PipelineUpscaler(place, device)
    _check_class(name, place, found.kind)
    return found


def open_upscalers(places: Mapping[str, str], device: str = "cpu") -> dict[str, Upscaler]:
    """:func:`open_upscaler` for several, by name."""
    return {name: open_upscaler(name, place, device) for name, place in places.items()}
