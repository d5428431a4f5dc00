"""The diffusion stage: flow matching on structured latents, Eq. 12 and 13."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import Dataset

from davae.errors import DavaeError
from davae.evaluation import sliced_wasserstein
from davae.latents import LatentLayout
from davae.models import LightningDiTTransformer2DModel
from davae.pipelines import ClassConditionalPipeline, latent_scaling
from davae.training.loop import Player, Stage
from davae.training.memory import LatentsInMemory, Relabelled
from davae.training.pictures import save_rows
from davae.training.settings import DiffusionSettings, FlowLossSettings, SampleSettings, TimestepSettings
from davae.warm_start import FlowLoss, channel_parameters, detail_weight, new_channel_masks, sample_sigmas

logger = logging.getLogger(__name__)
_PICTURES = 12
_LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "modulation"]


class FlowObjective(nn.Module):
    """The loss of one step: a velocity predicted at a random noise level.

    With ``x = (1 - sigma) data + sigma noise`` the target is ``noise - data``.

    Args:
        transformer: the (widened) transformer.
        layout: which channels are base and which are detail; no detail channels for a base model.
        loss: form and schedule of the loss.
        timesteps: how ``sigma`` is drawn.
        encode: images to latents, where a batch holds no ``latent``.
    """

    def __init__(
        self,
        transformer: LightningDiTTransformer2DModel,
        layout: LatentLayout,
        loss: FlowLossSettings,
        timesteps: TimestepSettings,
        encode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.encode = encode
        self.transformer = transformer
        self.layout, self.timesteps, self.settings = layout, timesteps, loss
        self.loss = FlowLoss(
            layout, form=loss.form, min_snr_gamma=loss.min_snr_gamma, cosine_weight=loss.cosine_weight
        )

    def forward(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Named losses of a batch with ``label`` and either ``latent`` ``[B, C + D, h, w]`` or ``image``.

        A cached latent is as the transformer sees it.
        """
        labels = batch["label"]
        data = (
            self.encode(batch["image"]) if self.encode is not None and "image" in batch else batch["latent"]
        )
        sigma = sample_sigmas(
            data.shape[0],
            scheme=self.timesteps.scheme,
            mean=self.timesteps.logit_mean,
            std=self.timesteps.logit_std,
            shift=self.timesteps.shift,
        ).to(data.device)
        noise = torch.randn_like(data)
        level = sigma.view(-1, 1, 1, 1)
        noisy = (1 - level) * data + level * noise
        # The transformer counts time from noise (t = 1 - sigma) and predicts data - noise.
        velocity = -self.transformer(noisy, 1 - sigma, labels).sample
        weight = detail_weight(
            step, self.settings.detail_warmup_steps, shape=self.settings.detail_schedule
        )  # w(n), Eq. 12
        loss = self.loss(velocity, data=data, noise=noise, sigma=sigma, weight=weight)
        with torch.no_grad():  # the two parts of Eq. 13 apart, for the log
            base, detail = self.layout.split((velocity.float() - (noise - data)).square())
        parts = {"base": base.mean(), "detail": detail.mean()} if self.layout.detail_channels else {}
        return {"total": loss, **parts, "detail_weight": torch.tensor(weight)}


class DiffusionStage(Stage):
    """Tunes the transformer of a class-conditional pipeline on the latents of its autoencoder."""

    name = "diffusion"

    def __init__(
        self,
        pipeline: ClassConditionalPipeline,
        layout: LatentLayout,
        settings: DiffusionSettings,
        dataset: Dataset[dict[str, Any]],
        held_out: Dataset[dict[str, Any]],
        *,
        cache_latents: bool = True,
        workers: int = 0,
        before: ClassConditionalPipeline | None = None,
    ) -> None:
        self.pipeline, self.layout, self.settings, self.loop = pipeline, layout, settings, settings.loop
        self.before = before
        self.workers = workers
        self.images = held_out
        self.vae = pipeline.vae.eval().requires_grad_(False)
        device = _best_device()
        self.vae.to(device)
        self.classes = ClassMap(dataset.classes, pipeline)  # type: ignore[attr-defined]
        if cache_latents:
            logger.info("encoding %d images", len(dataset))  # type: ignore[arg-type]
            self.dataset = LatentsInMemory(dataset, self._encode, self.classes)
        else:
            self.dataset = Relabelled(dataset, self.classes)
        self.held_out = LatentsInMemory(held_out, self._encode, self.classes)

        transformer = pipeline.transformer
        rates = _select_trained(transformer, layout, settings)
        if settings.loop.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.objective = FlowObjective(transformer, layout, settings.loss, settings.timesteps, self._encode)
        self.players = [
            Player(
                "model",
                self.objective,
                settings.optimizer,
                {f"transformer.{name}": rate for name, rate in rates.items()},
            )
        ]

    def to(self, device: torch.device) -> None:
        """Move the pipeline's frozen parts."""
        self.vae.to(device)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` images to latents as the transformer sees them, ``[B, C + D, h, w]``."""
        scaling, shift = latent_scaling(self.vae)
        latent = self.vae.encode(images.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (latent - shift) * scaling

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """Held-out loss at fixed noise, and a sheet of samples from fixed seeds (below: the base's, same seeds)."""
        values = self._held_out_loss(step)
        count = self.loop.validation_images
        made = generate_classes(
            self.pipeline, self.classes.known, count, self.settings.sample, seed=self.loop.seed
        )
        rows = {
            f"samples {i // _PICTURES}": made[i : i + _PICTURES] for i in range(0, min(count, 48), _PICTURES)
        }
        if self.before is not None:
            rows["base"] = generate_classes(
                self.before, self.classes.known, _PICTURES, self.settings.sample, seed=self.loop.seed
            )
        save_rows(samples / f"step-{step}.png", rows)
        real = torch.stack([self.images[i]["image"] for i in range(min(count, len(self.images)))])  # type: ignore[arg-type]
        values["swd"] = next(iter(sliced_wasserstein(made, real).values()))
        return values

    def _held_out_loss(self, step: int) -> dict[str, float]:
        sums: dict[str, float] = {}
        items = [self.held_out[i] for i in range(min(len(self.held_out), 256))]
        parts = [items[i : i + self.loop.batch_size] for i in range(0, len(items), self.loop.batch_size)]
        device = self.vae.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.loop.seed)
            for part in parts:
                batch = {
                    "latent": torch.stack([i["latent"] for i in part]).to(device),
                    "label": torch.tensor([i["label"] for i in part], device=device),
                }
                for name, value in self.objective(batch, self.loop.steps).items():
                    sums[name] = sums.get(name, 0.0) + float(value) * len(part) / len(items)
        return {f"held_out_{name}": value for name, value in sums.items() if name != "detail_weight"}

    def export(self, out: Path) -> Path:
        """Merge adapters and write ``out/pipeline`` in diffusers format."""
        transformer = self.pipeline.transformer.eval()
        if self.settings.tune.mode == "lora":
            transformer.fuse_lora()
            transformer.unload_lora()
        transformer.to(memory_format=torch.contiguous_format)
        self.pipeline.save_pretrained(out / "pipeline")
        return out / "pipeline"


class ClassMap:
    """From the labels of a data set to those of a pipeline, by class name.

    Images of a class that the pipeline does not know, or without a class, are trained without a label, as
    classifier-free guidance does with a share of all images.

    Args:
        classes: the data set's class names.
        pipeline: names its own classes in ``id2label``.
    """

    def __init__(self, classes: list[str], pipeline: ClassConditionalPipeline) -> None:
        self.null = int(pipeline.transformer.null_label)
        self.numbers = [pipeline.labels.get(name, self.null) for name in classes]
        unknown = [name for name, number in zip(classes, self.numbers) if number == self.null]
        if unknown and pipeline.labels:
            logger.warning(
                "the pipeline does not know %s%s: these images are trained without a label",
                ", ".join(unknown[:5]),
                f" and {len(unknown) - 5} more classes" if len(unknown) > 5 else "",
            )

    @property
    def known(self) -> list[int]:
        """The pipeline's labels that occur in the data set; "no class" where there is none."""
        return sorted(set(self.numbers) - {self.null}) or [self.null]

    def __call__(self, label: int) -> int:
        """The pipeline's label for a label of the data set (-1 is none)."""
        return self.null if label < 0 else self.numbers[label]


def generate_classes(
    pipeline: ClassConditionalPipeline,
    labels: list[int],
    count: int,
    sample: SampleSettings,
    *,
    seed: int,
    batch: int = 48,
) -> Tensor:
    """Samples of the given labels in turn, ``[count, 3, H, W]`` in [-1, 1], image ``i`` from seed ``seed + i``."""
    was_training = pipeline.transformer.training
    pipeline.transformer.eval()
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for first in range(0, count, batch):
        indices = range(first, min(first + batch, count))
        images = pipeline(  # type: ignore[union-attr]
            [labels[i % len(labels)] for i in indices],
            num_inference_steps=sample.num_inference_steps,
            guidance_scale=sample.guidance_scale,
            guidance_interval=sample.guidance_interval,
            generator=[torch.Generator().manual_seed(seed + i) for i in indices],
            output_type="pt",
        ).images  # [B, 3, H, W] in [0, 1]
        made.append(images.float().cpu() * 2 - 1)
    pipeline.transformer.train(was_training)
    return torch.cat(made)


def _select_trained(
    transformer: LightningDiTTransformer2DModel, layout: LatentLayout, settings: DiffusionSettings
) -> dict[str, float]:
    """Freeze and free parameters as ``tune.mode`` says; learning rates of the widened layers by name."""
    mode, tune = settings.tune.mode, settings.tune
    if mode != "full" and not layout.detail_channels:
        raise DavaeError(f"tune.mode={mode} needs detail channels; a base model is trained in full")
    widened = channel_parameters(transformer)
    transformer.requires_grad_(mode == "full")
    if mode == "lora":
        lora = LoraConfig(
            r=tune.lora.rank,
            lora_alpha=tune.lora.alpha,
            init_lora_weights="gaussian",
            target_modules=tune.lora.targets or _LORA_TARGETS,
        )
        transformer.add_adapter(lora)
    named = dict(transformer.named_parameters())
    for name in widened:
        named[name].requires_grad_(True)
    if mode == "new_channels":  # a zero gradient leaves the base's entries exactly as they are
        for name, mask in new_channel_masks(transformer, layout).items():
            named[name].register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient))
    rate = tune.new_channels_learning_rate
    return {} if rate is None else dict.fromkeys(widened, rate)


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
