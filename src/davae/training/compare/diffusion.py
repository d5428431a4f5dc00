"""The same diffusion transformer over the latents of different autoencoders: speed, and what it learns.

Every autoencoder gets a LightningDiT of one size, which differs in its first and last layer only, the same images,
steps, batches, noise levels and learning rate. Fewer tokens make it faster; whether it learns as well is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from davae.benchmark import side_by_side
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.metrics.image_set import ImageSet, compare_sets, spatial_distances
from davae.runtime.pictures import PICTURES
from davae.training.compare.autoencoders import Candidate
from davae.training.compare.trial import DiffusionOptions, Trial


@dataclass(frozen=True)
class DiffusionScore:
    """What the transformer makes of one autoencoder.

    Attributes:
        name: of the autoencoder.
        tokens: of an image.
        parameters: of the transformer.
        train_images_per_second: whole training steps (forward, backward, optimizer) on cached latents.
        sample_images_per_second: all steps with guidance, and the decoder.
        train_speedup, sample_speedup: over the first autoencoder, medians of the ratios round by round.
        train_flop_limited, sample_flop_limited: the ratios of the operations.
        loss: mean of the last tenth of the training.
        figures: ``swd/...`` and ``spectrum_db`` of decoded samples to held-out images, the samples' classes as in the
            data; by feature networks distances to the training images, such as ``fid/inception``.
    """

    name: str
    tokens: int
    parameters: int
    train_images_per_second: float
    sample_images_per_second: float
    train_speedup: float
    sample_speedup: float
    train_flop_limited: float
    sample_flop_limited: float
    loss: float
    figures: dict[str, float]


def score_diffusion(
    candidates: Sequence[Candidate],
    images: Tensor,
    labels: Tensor,
    held_out: Tensor,
    options: DiffusionOptions,
    *,
    classes: int,
    networks: Sequence[FeatureNetwork] = (),
) -> tuple[list[DiffusionScore], dict[str, Tensor]]:
    """Time, train and sample the same transformer over each autoencoder.

    Args:
        candidates: the first one is what the others are compared with.
        images: training images, [N, 3, R, R] in [-1, 1].
        labels: [N] int64 in [0, classes], where `classes` is no class.
        held_out: images that samples are compared with, [M, 3, R, R].
        options: alike for all.
        classes: number of classes.
        networks: for distances of features to the training images, as the published FID is measured.

    Returns:
        One row each, and the first samples by name.
    """
    real = ImageSet(networks, spatial=False)
    if networks:
        real.extend(images.split(options.batch))
    unseen = ImageSet().extend(held_out.split(options.batch))
    trials = {c.name: Trial(c, images, labels, classes, options) for c in candidates}
    wanted = labels[torch.arange(options.samples) % len(labels)]
    losses, found, shown = {}, {}, {}
    for name, trial in trials.items():
        losses[name] = trial.train()
        found[name], shown[name] = _gather(trial.batches(wanted), networks)
    cost = _Cost(trials, options)
    rows = []
    for name, trial in trials.items():
        last = losses[name][-max(1, options.steps // 10) :]
        rows.append(
            DiffusionScore(
                name=name,
                tokens=trial.candidate.tokens,
                parameters=sum(p.numel() for p in trial.transformer.parameters()),
                loss=sum(last) / len(last),
                figures=spatial_distances(found[name], unseen) | compare_sets(found[name], real).figures,
                **cost.of(name, over=candidates[0].name),
            )
        )
    return rows, shown


def _gather(batches: Iterable[Tensor], networks: Sequence[FeatureNetwork]) -> tuple[ImageSet, Tensor]:
    """What the metrics need of all the images, and the first of them."""
    found = ImageSet(networks)
    shown: list[Tensor] = []
    for images in batches:
        found.update(images)
        if len(shown) < PICTURES:
            shown += images[: PICTURES - len(shown)]
    return found, torch.stack(shown)


class _Cost:
    """Seconds, measured in turns, and operations of training and sampling."""

    def __init__(self, trials: dict[str, Trial], options: DiffusionOptions) -> None:
        self.options = options
        probes = {name: trial.probes() for name, trial in trials.items()}
        self.timed = {
            what: side_by_side({name: probes[name][what] for name in trials}, options.repeats)
            for what in ("train", "denoise", "decode")
        }
        self.flops = {name: trial.flops() for name, trial in trials.items()}

    def sample_seconds(self, name: str) -> list[float]:
        """Of a batch, round by round: all steps and the decoder."""
        denoise, decode = self.timed["denoise"].times[name], self.timed["decode"].times[name]
        return [self.options.sample_steps * a + b for a, b in zip(denoise, decode, strict=True)]

    def of(self, name: str, over: str) -> dict[str, float]:
        """The fields of :class:`DiffusionScore` that tell of speed."""
        seconds, reference = self.sample_seconds(name), self.sample_seconds(over)
        batch = self.options.batch
        return {
            "train_images_per_second": batch / self.timed["train"].medians[name],
            "sample_images_per_second": batch / median(seconds),
            "train_speedup": self.timed["train"].speedup(name, over),
            "sample_speedup": median(b / a for a, b in zip(seconds, reference, strict=True)),
            "train_flop_limited": self.flops[over][0] / self.flops[name][0],
            "sample_flop_limited": self.flops[over][1] / self.flops[name][1],
        }
