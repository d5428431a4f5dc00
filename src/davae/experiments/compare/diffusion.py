"""The same diffusion transformer on the latents of different autoencoders: speed and quality.

Every autoencoder gets a LightningDiT of one size (only the first and last layer depend on the latent), and the same
images, steps, batches, noise levels and learning rate. Fewer tokens make it faster; quality is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from statistics import median

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from davae.benchmark import count_flops, side_by_side
from davae.diffusion.loss import FlowLoss
from davae.diffusion.noise import FlowProcess
from davae.diffusion.schedulers import scheduler_step, set_sigmas
from davae.errors import DavaeError
from davae.evaluation.features import FeatureNetwork
from davae.evaluation.metrics.image_set import ImageSet, compare_sets, spatial_distances
from davae.experiments.compare.autoencoders import Candidate, decode_all, encode_all
from davae.latents import LatentLayout
from davae.models import LightningDiTTransformer2DModel
from davae.models.lightningdit import SIZES, Size
from davae.pipelines.class_conditional import guided_velocity
from davae.pipelines.families.classes import ClassConditional
from davae.recipes.loop import OptimizerSettings
from davae.recipes.settings import FlowLossSettings
from davae.runtime.pictures import PICTURES
from davae.runtime.progress import Progress
from davae.training.diffusion import DiffusionObjective
from davae.training.engine.optimizer import make_optimizer
from davae.training.loop.averages import Ema


@dataclass(frozen=True)
class DiffusionScore:
    """Speed and quality of the transformer on one autoencoder's latents.

    Attributes:
        name: of the autoencoder.
        tokens: per image.
        parameters: of the transformer.
        train_images_per_second: whole training steps (forward, backward, optimizer) on cached latents.
        sample_images_per_second: all steps with guidance, and the decoder.
        train_speedup, sample_speedup: over the first autoencoder, medians of the ratios of all rounds.
        train_flop_limited, sample_flop_limited: the first autoencoder's FLOPs per image over this one's.
        loss: mean over the last tenth of training.
        figures: ``swd/...`` and ``spectrum_db`` between decoded samples, of the data's labels, and held-out images;
            feature distances to the training images, such as ``fid/inception``.
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
    """Train, sample and time the same transformer on the latents of each autoencoder.

    Args:
        candidates: the first one is the reference.
        images: training images, ``[N, 3, R, R]`` in [-1, 1].
        labels: ``[N]`` int64 in [0, ``classes``], where ``classes`` means no class.
        held_out: images to compare samples with, ``[M, 3, R, R]`` in [-1, 1].
        options: the same for all.
        classes: number of classes.
        networks: for feature distances to the training images, as published FIDs are measured.

    Returns:
        One row each, and the first samples by name.
    """
    real = ImageSet(networks, spatial=False)
    if networks:
        real.extend(images.split(options.batch))
    unseen = ImageSet().extend(held_out.split(options.batch))
    trials: dict[str, TinyRun] = {}
    for c in candidates:
        trials[c.name] = (
            TinyRun(c, images, labels, classes, options) if c.latents_of is None else trials[c.latents_of].of(c)
        )
    wanted = labels[torch.arange(options.samples) % len(labels)]
    losses: dict[str, list[float]] = {}
    found, shown = {}, {}
    for name, trial in trials.items():
        source = trial.candidate.latents_of
        losses[name] = trial.train() if source is None else losses[source]
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
    """What the metrics need of all images, and the first few images."""
    found = ImageSet(networks)
    shown: list[Tensor] = []
    for images in batches:
        found.update(images)
        if len(shown) < PICTURES:
            shown += images[: PICTURES - len(shown)]
    return found, torch.stack(shown)


class _Cost:
    """Seconds, measured alternately, and FLOPs of training and sampling."""

    def __init__(self, trials: dict[str, TinyRun], options: DiffusionOptions) -> None:
        self.options = options
        probes = {name: trial.probes() for name, trial in trials.items()}
        self.timed = {
            what: side_by_side({name: probes[name][what] for name in trials}, options.repeats)
            for what in ("train", "denoise", "decode")
        }
        self.flops = {name: trial.flops() for name, trial in trials.items()}

    def sample_seconds(self, name: str) -> list[float]:
        """Seconds per batch (all steps and the decoder), by round."""
        denoise, decode = self.timed["denoise"].times[name], self.timed["decode"].times[name]
        return [self.options.sample_steps * a + b for a, b in zip(denoise, decode, strict=True)]

    def of(self, name: str, over: str) -> dict[str, float]:
        """The fields of :class:`DiffusionScore` about speed."""
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


@dataclass(frozen=True)
class DiffusionOptions:
    """Settings of training and sampling, the same for all autoencoders.

    Attributes:
        steps: of training.
        batch: images per step.
        size: of the transformer, see :func:`transformer_size`.
        learning_rate: of AdamW, with betas 0.9 and 0.95.
        ema: decay of the averaged weights used for sampling.
        samples: number of images for the metrics.
        sample_steps: Euler steps per sample.
        guidance: scale of classifier-free guidance; 1 is none.
        seed: of weights, batches, noise and samples.
        repeats: rounds of timing.
    """

    steps: int
    batch: int = 32
    size: Size = field(default_factory=lambda: SIZES["S"])
    learning_rate: float = 5e-4
    ema: float = 0.995
    samples: int = 32
    sample_steps: int = 25
    guidance: float = 2.0
    seed: int = 0
    repeats: int = 5


def transformer_size(text: str) -> Size:
    """Parse a name such as ``S``, ``B``, ``L``, ``XL``, or ``WIDTHxDEPTHxHEADS`` such as ``256x8x4``.

    Raises:
        DavaeError: it is neither.
    """
    named = {name.lower(): size for name, size in SIZES.items()}
    if text.lower() in named:
        return named[text.lower()]
    parts = text.lower().split("x")
    if len(parts) == 3 and all(part.isdecimal() and int(part) for part in parts):
        width, depth, heads = map(int, parts)
        return Size(num_layers=depth, hidden_size=width, num_attention_heads=heads)
    raise DavaeError(f"transformer size '{text}' is unknown: it is one of {', '.join(SIZES)}, or WIDTHxDEPTHxHEADS")


class TinyRun:
    """One autoencoder's transformer, its normalised latents and its optimizer."""

    def __init__(
        self, candidate: Candidate, images: Tensor, labels: Tensor, classes: int, options: DiffusionOptions
    ) -> None:
        self.candidate, self.options, self.labels = candidate, options, labels
        self.device = candidate.model.device
        raw = encode_all(candidate, images)
        # As in LightningDiT: every channel to mean 0 and standard deviation 1, whatever the autoencoder's own scaling.
        self.mean = raw.mean((0, 2, 3), keepdim=True)
        self.std = raw.std((0, 2, 3), keepdim=True).clamp_min(1e-6)
        self.latents = (raw - self.mean) / self.std  # [N, C, h, w]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            self.transformer = LightningDiTTransformer2DModel(
                **options.size,
                sample_size=raw.shape[-1],
                patch_size=candidate.patch,
                in_channels=candidate.channels,
                num_classes=classes,
                qk_norm=True,
            ).to(self.device)
        layout = LatentLayout(candidate.channels, 0)
        self.objective = DiffusionObjective(
            ClassConditional(), self.transformer, layout, FlowProcess(FlowLoss(layout)), FlowLossSettings()
        ).train()
        settings = OptimizerSettings(learning_rate=options.learning_rate, betas=(0.9, 0.95))
        self.optimizer = make_optimizer(candidate.name, self.objective, settings, {})
        self.ema = Ema(self.transformer.parameters(), options.ema)

    def of(self, candidate: Candidate) -> TinyRun:
        """The same run, whose samples another candidate decodes."""
        shared = copy(self)
        shared.candidate = candidate
        return shared

    def step(self, number: int) -> float:
        """One training step; returns its loss. The batch and its noise depend only on the seed and ``number``."""
        generator = torch.Generator().manual_seed(self.options.seed + number)
        chosen = torch.randint(len(self.latents), (self.options.batch,), generator=generator)
        batch = {"latent": self.latents[chosen].to(self.device), "label": self.labels[chosen].to(self.device)}
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.options.seed + number)
            loss = self.objective(batch, number)["total"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        self.optimizer.step()
        self.ema.update()
        return float(loss.detach())

    def velocity(self, latents: Tensor, sigma: float, labels: Tensor) -> Tensor:
        """The guided velocity of ``[B, C, h, w]`` latents, as in sampling."""
        with torch.no_grad():
            return guided_velocity(self.transformer, latents, sigma, labels, guidance_scale=self.options.guidance)

    def train(self) -> list[float]:
        """Make all steps; returns the loss of each."""
        losses = []
        with Progress(f"{self.candidate.name}, {self.candidate.tokens} tokens", self.options.steps) as progress:
            for number in range(self.options.steps):
                losses.append(self.step(number))
                progress.losses({"loss": losses[-1]})
                progress.advance()
        return losses

    def sampled(self, labels: Tensor) -> Tensor:
        """Samples ``[N, 3, R, R]`` in [-1, 1] of labels ``[N]``, on the CPU."""
        return torch.cat(list(self.batches(labels)))

    def batches(self, labels: Tensor) -> Iterator[Tensor]:
        """:meth:`sampled` batch by batch: ten thousand images of 512 pixels do not fit into memory."""
        self.transformer.eval()
        with self.ema.applied():
            for first in range(0, len(labels), self.options.batch):
                part = labels[first : first + self.options.batch].to(self.device)
                shape = (len(part), *self.latents.shape[1:])
                generator = torch.Generator().manual_seed(self.options.seed + first)
                latents = torch.randn(shape, generator=generator).to(self.device)
                scheduler = FlowMatchEulerDiscreteScheduler()
                sigmas = set_sigmas(scheduler, self.options.sample_steps, self.device)
                for sigma, timestep in zip(sigmas, scheduler.timesteps, strict=True):
                    velocity = self.velocity(latents, sigma, part)
                    latents = scheduler_step(scheduler, velocity, timestep, latents, None)
                yield decode_all(self.candidate, latents.cpu() * self.std + self.mean)
        self.transformer.train()

    def probes(self) -> dict[str, Callable[[], object]]:
        """What is timed: a training step, a denoising step with guidance, and a decode, of one batch each.

        To be used after training and sampling: the training step changes the weights.
        """
        count = self.options.batch
        latents = self.latents[torch.arange(count) % len(self.latents)].to(self.device)
        raw = latents * self.std.to(self.device) + self.mean.to(self.device)
        labels = torch.zeros(count, dtype=torch.long, device=self.device)
        return {
            "train": lambda: self.step(0),
            "denoise": lambda: self.velocity(latents, 0.5, labels),
            "decode": lambda: self.candidate.decode(raw),
        }

    def flops(self) -> tuple[int, int]:
        """FLOPs per image: of a training step (three forward passes), and of a sample with its decoding."""
        probes, count = self.probes(), self.options.batch
        guided, decode = (count_flops(probes[name]) // count for name in ("denoise", "decode"))
        passes = 2 if self.options.guidance != 1 else 1
        return 3 * guided // passes, self.options.sample_steps * guided + decode
