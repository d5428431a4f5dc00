"""The whole comparison: from images to tables and picture sheets."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.data import open_dataset
from davae.errors import DavaeError
from davae.evaluation.features import open_network
from davae.evaluation.metrics.names import LPIPS
from davae.evaluation.metrics.psnr_ssim import Perceptual
from davae.evaluation.upscalers import check_upscaler, open_upscalers
from davae.experiments.compare.autoencoders import AutoencoderScore, open_candidates, score_autoencoders
from davae.experiments.compare.diffusion import DiffusionOptions, DiffusionScore, score_diffusion
from davae.models.perceptual import LpipsLoss
from davae.runtime.atomic_files import atomic_json
from davae.runtime.devices import chosen_device, wanted_dtype
from davae.runtime.pictures import PICTURES, save_rows
from davae.runtime.places import check_place, claim


@dataclass(frozen=True)
class Comparison:
    """Measurements of several autoencoders, and their conditions.

    Attributes:
        data: where the images come from.
        resolution: side of an image in pixels.
        images: number of images reconstructed.
        device: name of the GPU, or ``CPU``.
        torch: version.
        autoencoders: one row each.
        diffusion: one row each; empty if no transformer was trained.
        options: of the diffusion part.
        training_images: number of images that the transformers were trained on.
        networks: weights and preprocessing of the feature networks.
        upscalers: what each upscaler is, by name.
    """

    data: str
    resolution: int
    images: int
    device: str
    torch: str
    autoencoders: list[AutoencoderScore]
    diffusion: list[DiffusionScore] = field(default_factory=list)
    options: DiffusionOptions | None = None
    training_images: int = 0
    networks: list[dict[str, Any]] = field(default_factory=list)
    upscalers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_autoencoders(
    autoencoders: Mapping[str, str | Path | ModelMixin],
    *,
    data: str,
    resolution: int,
    images: int = 64,
    tokens: int | None = None,
    diffusion: DiffusionOptions | None = None,
    train_images: int = 2048,
    batch: int = 8,
    repeats: int = 5,
    device: str | None = None,
    dtype: str | None = None,
    out: Path | None = None,
    features: Sequence[str] = (),
    lpips: Path | None = None,
    upscalers: Mapping[str, str] | None = None,
) -> Comparison:
    """Measure autoencoders on the same images and, with ``diffusion``, a transformer trained on each one's latents.

    Args:
        autoencoders: by name, the folder of an autoencoder or of a pipeline, or a model. The first is the reference.
        data: a folder or data set of images, see docs/data.md.
        resolution: side of the square image in pixels, a multiple of every compression.
        images: number of images to reconstruct; with ``diffusion`` they are held out of training.
        tokens: tokens per image for all transformers; by default patch size 1 everywhere.
        diffusion: how to train and sample; ``None`` skips that part.
        train_images: maximum number of images to train transformers on; all are kept in memory.
        batch: images at a time through the autoencoders.
        repeats: rounds of timing of the autoencoders.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of the autoencoders in folders; by default as saved.
        out: folder for ``comparison.json``, ``reconstructions.png`` and ``samples.png``.
        features: networks for feature distances of reconstructions (rFID) and samples (FID), as in
            :func:`davae.evaluation.features.open_network`.
        lpips: file of torchvision's VGG-16 weights; ``None`` skips LPIPS.
        upscalers: by name, what enlarges the images of an upgraded autoencoder's base, see
            :func:`davae.evaluation.upscalers.open_upscaler`.

    Raises:
        DavaeError: there are no images, an autoencoder does not fit, or weights are missing.
    """
    where, wanted = torch.device(chosen_device(device)), wanted_dtype(dtype)
    if out is not None:
        check_place(out, "comparison")
    networks = [open_network(name, device=where) for name in features]
    perceptual = {} if lpips is None else {LPIPS: Perceptual(LpipsLoss(str(lpips)), where)}
    for name, place in (upscalers or {}).items():
        check_upscaler(name, place)
    opened = open_upscalers(upscalers or {}, str(where))
    candidates = open_candidates(autoencoders, resolution, tokens=tokens, upscalers=opened, device=where, dtype=wanted)
    if diffusion is None:
        held_out, _, _ = _images(data, resolution, images)
    else:
        held_out, _, _ = _images(data, resolution, images, hold_out=images, part="held_out")
    rows, made = score_autoencoders(
        candidates, held_out, batch=batch, repeats=repeats, networks=networks, perceptual=perceptual
    )
    scores: list[DiffusionScore] = []
    sheets = {"reconstructions": {"input": held_out, **made}}
    if diffusion is not None:
        learned, labels, classes = _images(data, resolution, train_images, hold_out=images, part="train")
        scores, samples = score_diffusion(
            candidates, learned, labels, held_out, diffusion, classes=max(1, classes), networks=networks
        )
        sheets["samples"] = {"held-out images": held_out, **samples}
    result = Comparison(
        data=data,
        resolution=resolution,
        images=len(held_out),
        device=torch.cuda.get_device_name() if where.type == "cuda" else "CPU",
        torch=torch.__version__,
        autoencoders=rows,
        diffusion=scores,
        options=diffusion,
        training_images=0 if diffusion is None else len(learned),
        networks=[network.describe() for network in networks],
        upscalers={name: upscaler.describe() for name, upscaler in opened.items()},
    )
    if out is not None:
        with claim(out, "comparison") as folder:
            atomic_json(folder / "comparison.json", result.to_json())
            for name, pictures in sheets.items():
                save_rows(folder / f"{name}.png", {row: shown[:PICTURES] for row, shown in pictures.items()})
    return result


def _images(data: str, resolution: int, count: int, **part: Any) -> tuple[Tensor, Tensor, int]:
    """Images ``[N, 3, R, R]``, labels ``[N]`` (``max(1, classes)``: no class), and the number of classes."""
    dataset = open_dataset(data, resolution=resolution, **part)
    items = [dataset[i] for i in range(min(count, len(dataset)))]
    if not items:
        raise DavaeError(f"{data} has no images left for this part of the comparison: add images, or ask for fewer")
    classes = len(dataset.classes)
    none = max(1, classes)
    labels = [none if item["label"] < 0 else item["label"] for item in items]
    return torch.stack([item["image"] for item in items]), torch.tensor(labels), classes
