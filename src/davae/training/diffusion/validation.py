"""Validation of the diffusion stage: a loss at fixed noise, and samples from fixed seeds."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from davae.data import Item, ItemDataset, collate
from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.models.latent_space import compression_of
from davae.pipelines.families import ClassFamily, family_of
from davae.recipes.settings import SampleSettings
from davae.runtime.pixel_budget import images_together
from davae.runtime.processes import gathered, share
from davae.training.loop.loop import to_device
from davae.training.loop.rng import DrawsByItem, draws_by

MEASURED = 256
"""Maximum number of held-out items for the loss."""
_SEED_STRIDE = 1_000_003


@torch.no_grad()
def held_out_loss(
    objective: Callable[[Item, int], dict[str, Tensor]],
    items: ItemDataset,
    *,
    batch_size: int,
    step: int,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Means of the objective's losses over held-out items, as ``held_out_<name>``, with the same noise every time.

    Batches are divided among the processes. An item's noise depends on the seed and its index only, not on batch size
    or number of processes.

    Args:
        objective: the stage's, in eval mode.
        items: with ``latent`` and what else the objective needs; the first :data:`MEASURED` are used.
        batch_size: items per batch.
        step: for the schedule of the detail weight.
        seed: of the noise; torch's own random state is not used.
        device: of the objective.
    """
    chosen = [items[i] for i in range(min(len(items), MEASURED))]
    parts = list(_parts(chosen, batch_size))
    firsts = [0, *itertools.accumulate(map(len, parts))]
    found: list[dict[str, float]] = []
    for number in share(len(parts)):  # the last one may be repeated
        batch = to_device({k: v for k, v in collate(parts[number]).items() if k != "skipped"}, device)
        numbers = range(firsts[number], firsts[number + 1])
        with draws_by(DrawsByItem([seed * _SEED_STRIDE + item for item in numbers])):
            found.append({name: float(value) for name, value in objective(batch, step).items()})
    sums: dict[str, float] = {}
    for part, losses in zip(parts, gathered(found, len(parts)), strict=True):
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value * len(part) / len(chosen)
    return {f"held_out_{name}": value for name, value in sums.items() if name != "detail_weight"}


def _parts(items: list[Item], size: int) -> list[list[Item]]:
    """Batches of at most ``size`` consecutive items of one shape."""
    parts: list[list[Item]] = []
    for item in items:
        same = parts and parts[-1][0]["latent"].shape == item["latent"].shape
        if same and len(parts[-1]) < size:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts


@contextmanager
def decoded_latents(vae: Any) -> Iterator[list[Tensor]]:
    """Within the context, the list gets the latents that pipelines hand to ``vae.decode``."""
    latents: list[Tensor] = []

    def decode(z: Tensor, *args: Any, **options: Any) -> Any:
        latents.append(z)
        return type(vae).decode(vae, z, *args, **options)

    vae.decode = decode
    try:
        yield latents
    finally:
        del vae.decode


def has_previews(vae: Any) -> bool:
    """Whether :func:`preview` can decode with what was there before this autoencoder's last level."""
    return isinstance(vae, AutoencoderDA) and bool(vae.config.has_base_decoder) and vae.layout.detail_channels > 0


def preview(vae: AutoencoderDA, latents: Tensor) -> Tensor:
    """What the pipeline before the upgrade makes of the channels it knows, images ``[B, 3, h, w]`` in [-1, 1].

    Args:
        vae: with its base's decoder; of several levels, the last one's details are left out.
        latents: [B, C + D, h, w], as ``vae.decode`` takes them.
    """
    return vae.decode_level(latents, vae.levels[-1].number - 1).float().clamp(-1, 1)


def generate_classes(
    pipeline: DiffusionPipeline,
    labels: list[int],
    count: int,
    sample: SampleSettings,
    *,
    seed: int,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """Samples ``[count, 3, H, W]`` in [-1, 1], cycling through labels; image ``i`` is made from seed ``seed + i``.

    Args:
        pipeline: class-conditional.
        labels: the pipeline's labels.
        count: number of images.
        sample: steps and guidance.
        seed: of the first image.
        positions: which of the images to make, in this order; by default all.

    Raises:
        DavaeError: the pipeline is not class-conditional.
    """
    family = family_of(pipeline)
    if not isinstance(family, ClassFamily):
        raise DavaeError(f"{type(pipeline).__name__} generates images from prompts, not from classes")

    def make(indices: Sequence[int], generators: list[torch.Generator]) -> Tensor:
        return family.sample_labels(
            pipeline,
            [labels[i % len(labels)] for i in indices],
            num_inference_steps=sample.num_inference_steps,
            guidance_scale=sample.guidance_scale,
            guidance_interval=sample.guidance_interval,
            generators=generators,
        )

    side = pipeline.transformer.config.sample_size * compression_of(pipeline.vae)
    together = images_together(side, side)
    return _in_batches(pipeline, make, range(count) if positions is None else positions, together, seed)


def generate_prompts(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    size: tuple[int, int],
    sample: SampleSettings,
    *,
    seed: int,
    max_length: int | None = None,
    positions: Sequence[int] | None = None,
    embeddings: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Tensor:
    """One image per prompt, ``[len(prompts), 3, H, W]`` in [-1, 1]; image ``i`` is made from seed ``seed + i``.

    Args:
        pipeline: of a text family.
        prompts: one per image.
        size: height and width in pixels.
        sample: steps and guidance.
        seed: of the first image.
        max_length: tokens that a prompt is cut or padded to; by default the family's.
        positions: which of the images to make, in this order; by default all.
        embeddings: see :meth:`PipelineFamily.sample`.
    """
    family = family_of(pipeline)

    def make(indices: Sequence[int], generators: list[torch.Generator]) -> Tensor:
        return family.sample(
            pipeline,
            [prompts[i] for i in indices],
            height=size[0],
            width=size[1],
            num_inference_steps=sample.num_inference_steps,
            guidance_scale=sample.guidance_scale,
            generators=generators,
            max_length=max_length,
            embeddings=embeddings,
        )

    together = min(4, images_together(*size))
    return _in_batches(pipeline, make, range(len(prompts)) if positions is None else positions, together, seed)


def _in_batches(
    pipeline: DiffusionPipeline,
    make: Callable[[Sequence[int], list[torch.Generator]], Tensor],
    positions: Sequence[int],
    batch: int,
    seed: int,
) -> Tensor:
    """Call ``make`` on batches of positions with the transformer in eval mode; image ``i`` has seed ``seed + i``."""
    transformer = pipeline.transformer
    was_training = transformer.training
    transformer.eval()
    try:
        made = []
        for first in range(0, len(positions), batch):
            indices = positions[first : first + batch]
            made.append(make(indices, [torch.Generator().manual_seed(seed + i) for i in indices]))
        return torch.cat(made)
    finally:
        transformer.train(was_training)
