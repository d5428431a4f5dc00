"""One autoencoder's transformer in the comparison: the same for all but its first and last layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from davae.benchmark import count_flops
from davae.diffusion.loss import FlowLoss
from davae.diffusion.noise import FlowProcess
from davae.diffusion.schedulers import scheduler_step, set_sigmas
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import LightningDiTTransformer2DModel
from davae.models.latent_space import decode
from davae.models.lightningdit import SIZES, Size
from davae.pipelines.class_conditional import guided_velocity
from davae.pipelines.families.classes import ClassConditional
from davae.recipes.loop import OptimizerSettings
from davae.recipes.settings import FlowLossSettings
from davae.runtime.progress import Progress
from davae.training.compare.autoencoders import Candidate, decode_all, encode_all
from davae.training.diffusion import DiffusionObjective
from davae.training.ema import Ema
from davae.training.optimizers import make_optimizer


@dataclass(frozen=True)
class DiffusionOptions:
    """The training and sampling that all autoencoders get alike.

    Attributes:
        steps: of the training.
        batch: images a step.
        size: of the transformer, see :func:`transformer_size`.
        learning_rate: of AdamW, betas 0.9 and 0.95.
        ema: decay of the running mean that is sampled with.
        samples: images made for the metric.
        sample_steps: Euler steps of a sample.
        guidance: classifier-free guidance.
        seed: of the weights, batches, noise and samples.
        repeats: rounds of the timing.
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
    """``S``, ``B``, ``L``, ``XL`` and kin, or ``WIDTHxDEPTHxHEADS`` such as ``256x8x4``.

    Raises:
        DavaeError: neither.
    """
    named = {name.lower(): size for name, size in SIZES.items()}
    if text.lower() in named:
        return named[text.lower()]
    parts = text.lower().split("x")
    if len(parts) == 3 and all(part.isdecimal() and int(part) for part in parts):
        width, depth, heads = map(int, parts)
        return Size(num_layers=depth, hidden_size=width, num_attention_heads=heads)
    raise DavaeError(
        f"transformer size '{text}' is unknown: it is one of {', '.join(SIZES)}, or WIDTHxDEPTHxHEADS"
    )


class Trial:
    """One autoencoder's transformer, its normalised latents and its optimizer."""

    def __init__(
        self, candidate: Candidate, images: Tensor, labels: Tensor, classes: int, options: DiffusionOptions
    ) -> None:
        self.candidate, self.options, self.labels = candidate, options, labels
        self.device = candidate.model.device
        raw = encode_all(candidate, images, options.batch)
        # As LightningDiT does: every channel to mean 0 and deviation 1, whatever the autoencoder's own scaling.
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

    def step(self, number: int) -> float:
        """One training step; the batch and its noise depend on ``number`` alone."""
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
        """Guided, as in sampling."""
        with torch.no_grad():
            return guided_velocity(
                self.transformer, latents, sigma, labels, guidance_scale=self.options.guidance
            )

    def train(self) -> list[float]:
        """All steps; the loss of each."""
        losses = []
        with Progress(
            f"{self.candidate.name}, {self.candidate.tokens} tokens", self.options.steps
        ) as progress:
            for number in range(self.options.steps):
                losses.append(self.step(number))
                progress.losses({"loss": losses[-1]})
                progress.advance()
        return losses

    def sampled(self, labels: Tensor) -> Tensor:
        """Images of labels [N], in [-1, 1] on the CPU."""
        return torch.cat(list(self.batches(labels)))

    def batches(self, labels: Tensor) -> Iterator[Tensor]:
        """The same batch by batch: ten thousand images of 512 pixels do not fit into memory."""
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
                yield decode_all(self.candidate, latents.cpu() * self.std + self.mean, self.options.batch)
        self.transformer.train()

    def probes(self) -> dict[str, Callable[[], object]]:
        """What is timed: a training step, a denoising step with guidance, and a decode, of one batch each.

        For after the training: they go on with it.
        """
        count = self.options.batch
        latents = self.latents[torch.arange(count) % len(self.latents)].to(self.device)
        raw = latents * self.std.to(self.device) + self.mean.to(self.device)
        labels = torch.zeros(count, dtype=torch.long, device=self.device)
        return {
            "train": lambda: self.step(0),
            "denoise": lambda: self.velocity(latents, 0.5, labels),
            "decode": lambda: decode(self.candidate.model, raw),
        }

    def flops(self) -> tuple[int, int]:
        """Operations for one image: of a training step (three forwards), and of a sample with its decoding."""
        probes, count = self.probes(), self.options.batch
        guided, decode = (count_flops(probes[name]) // count for name in ("denoise", "decode"))
        passes = 2 if self.options.guidance != 1 else 1
        return 3 * guided // passes, self.options.sample_steps * guided + decode
