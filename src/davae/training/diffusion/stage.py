"""The diffusion stage: a widened transformer is tuned on structured latents (Eq. 12 and 13)."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.data import Dataset

from davae.data import Item, ItemDataset, as_item_dataset
from davae.data.in_memory import LatentsInMemory, Prepared
from davae.evaluation import sliced_wasserstein
from davae.evaluation.metrics.names import SWD_FINEST
from davae.latents import LatentLayout
from davae.pipelines.families import ClassFamily, family_of
from davae.pipelines.lora import merge_lora
from davae.pipelines.saving.adapters import save_adapters
from davae.recipes.settings import DiffusionSettings
from davae.runtime.atomic_files import atomic_write, save_whole
from davae.runtime.pictures import save_rows
from davae.runtime.pixel_budget import in_parts
from davae.runtime.processes import gathered_in_first, is_first, share, start_processes
from davae.training.data import require_captions
from davae.training.diffusion.conditioning import ClassMap, PromptEmbeddings, move_text_encoders
from davae.training.diffusion.objective import DiffusionObjective, noise_process
from davae.training.diffusion.tuning import learning_masks, select_trained
from davae.training.diffusion.validation import MEASURED, generate_classes, generate_prompts, held_out_loss
from davae.training.stage import Stage, TrainedModule

logger = logging.getLogger(__name__)
_PICTURES = 12  # in a row
_SHOWN = 48


class DiffusionStage(Stage):
    """Tunes the transformer of a pipeline on the latents of its autoencoder.

    Args:
        pipeline: an upgraded pipeline (or a base one) of a known family.
        layout: its base and detail channels.
        settings: the recipe's section.
        dataset: images with labels or captions; a cache has ``latent`` and, for text, ``conditioning`` instead.
        held_out: validation images with labels or captions.
        cache_latents: encode the images once and keep the latents in memory.
        workers: data loader processes.
        timeout_s: seconds to wait for a batch of images; 0 waits forever.
        before: the pipeline before the upgrade, for samples to compare with.

    Raises:
        DavaeError: the pipeline is unknown, captions are needed and missing, or settings do not fit.
    """

    name = section = "diffusion"
    other_sections: Sequence[str] = ("autoencoder",)

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        layout: LatentLayout,
        settings: DiffusionSettings,
        dataset: Dataset[Item],
        held_out: Dataset[Item],
        *,
        cache_latents: bool = True,
        workers: int = 0,
        timeout_s: float = 0.0,
        before: DiffusionPipeline | None = None,
    ) -> None:
        self.pipeline, self.layout, self.settings, self.loop = pipeline, layout, settings, settings.loop
        self.family = family_of(pipeline)
        self.before = before
        self.workers, self.timeout_s = workers, timeout_s
        self.family.check_length(settings.prompts.max_length)
        if isinstance(self.family, ClassFamily):
            self.family.check_interval(settings.sample.guidance_interval)
        images, self.images = as_item_dataset(dataset), as_item_dataset(held_out)
        self.measured_on = (self.images,)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.device = device = start_processes().device
        self.vae.to(device)
        cached = images.holds_latents
        self.encodes_while_training = not (cached or cache_latents)
        measured = LatentsInMemory(self.images, self._encode, dict, limit=MEASURED)
        self.conditions = self._conditions(images, [item["caption"] for item in measured.items], device)
        prompts = self.conditions if isinstance(self.conditions, PromptEmbeddings) else None
        if cached and self.family.conditioned_on == "text":
            self.dataset = images
        elif cache_latents and not cached:
            logger.info("encoding %d images", len(images))
            self.dataset = LatentsInMemory(
                images, self._encode, self.conditions.prepare, workers=workers, timeout_s=timeout_s
            )
        else:  # a cache keeps labels as the data set has them
            self.dataset = Prepared(images, self.conditions.prepare)
        self.held_out = Prepared(measured, self.conditions.prepare)

        transformer = pipeline.transformer
        rates = select_trained(transformer, self.family, layout, settings)
        if settings.loop.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        self.objective = DiffusionObjective(
            self.family,
            transformer,
            layout,
            noise_process(self.family, pipeline, layout, settings.loss, settings.timesteps),
            settings.loss,
            encode=self._encode,
            unconditional=prompts.unconditional if prompts else None,
            dropout=settings.prompts.dropout if prompts else 0.0,
            guidance=settings.prompts.guidance,
        )
        self.modules = [
            TrainedModule(
                "model",
                self.objective,
                settings.optimizer,
                {f"transformer.{name}": rate for name, rate in rates.items()},
                gradient_masks={
                    f"transformer.{name}": mask
                    for name, mask in learning_masks(transformer, layout, settings.tune).items()
                },
            )
        ]
        self._base_row: Tensor | None = None

    def to(self, device: torch.device) -> None:
        """Set the device; the autoencoder stays on the CPU unless training needs it."""
        self.device = device
        self._rest_autoencoder()

    def _rest_autoencoder(self) -> None:
        """Move the autoencoder off the device between validations, unless images are encoded during training."""
        self.vae.to(self.device if self.encodes_while_training else "cpu")

    def _conditions(
        self, images: ItemDataset, measured: list[str], device: torch.device
    ) -> ClassMap | PromptEmbeddings:
        """What turns an item's label or caption into the transformer's conditioning.

        Args:
            images: for training; a cache has its own text embeddings.
            measured: captions of the held-out images that are measured.
            device: where the text encoders run.
        """
        if self.family.conditioned_on == "class":
            return ClassMap(images.classes, self.pipeline)
        trained = images.captions()
        require_captions(trained, self.pipeline)
        asked = measured if images.holds_latents else trained + measured
        length = self.settings.prompts.max_length
        return PromptEmbeddings(self.family, self.pipeline, asked, device, length)

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to the transformer's (scaled) latents ``[B, C + D, h, w]``, without autocast."""
        with torch.autocast(self.vae.device.type, enabled=False):
            parts = [self.family.latents_of(self.vae, part) for part in in_parts(images)]
        return torch.cat(parts)

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """Held-out loss at fixed noise, sliced Wasserstein distance of samples; a sheet of them and of the base's."""
        device = self.device
        self.vae.to(device)
        with self._precision():
            values = held_out_loss(
                self.objective,
                self.held_out,
                batch_size=self.loop.batch_size,
                step=self.loop.steps,
                seed=self.loop.seed,
                device=device,
            )
            count = self.loop.validation_images
            move_text_encoders(self.pipeline, device)
            made = self._samples(self.pipeline, count, self._size())
            base = self._base_samples(min(count, _PICTURES))
            move_text_encoders(self.pipeline, torch.device("cpu"))
        self._rest_autoencoder()
        if not is_first():  # the first process has all samples
            return values
        rows = {f"samples {i // _PICTURES}": made[i : i + _PICTURES] for i in range(0, min(count, _SHOWN), _PICTURES)}
        if base is not None:
            rows["base"] = base
        save_rows(samples / f"step-{step}.png", rows)
        if isinstance(self.conditions, PromptEmbeddings):
            atomic_write(samples / "prompts.txt", "\n".join(self.validation_prompts()) + "\n")
        if len(self.images):
            shown = [self.images[i]["image"] for i in range(min(count, len(self.images)))]
            real = torch.stack([image for image in shown if image.shape == made.shape[1:]] or shown[:1])
            if real.shape[1:] == made.shape[1:]:
                values[SWD_FINEST] = sliced_wasserstein(made, real)[0]
        return values

    def _samples(self, pipeline: DiffusionPipeline, count: int, size: tuple[int, int]) -> Tensor:
        """Samples ``[count, 3, H, W]`` in [-1, 1], cycling through the data's classes or the validation prompts.

        Each process generates its share; the first one gets all, the others none.
        """
        sample, seed, mine = self.settings.sample, self.loop.seed, share(count)
        if isinstance(self.conditions, ClassMap):
            made = generate_classes(pipeline, self.conditions.known, count, sample, seed=seed, positions=mine)
        else:
            prompts = self.validation_prompts()
            made = generate_prompts(
                pipeline,
                [prompts[i % len(prompts)] for i in range(count)],
                size,
                sample,
                seed=seed,
                max_length=self.settings.prompts.max_length,
                positions=mine,
            )
        found = gathered_in_first(list(made.cpu()), count)
        return torch.stack(found) if found else made[:0]

    def _base_samples(self, count: int) -> Tensor | None:
        """Samples of the base pipeline at its own resolution, generated once; ``None`` without a base."""
        if self.before is not None:
            height, width = self._size()
            scale = getattr(self.pipeline.vae, "scale", 1)
            parts = (self.before.transformer, self.before.vae)
            for part in parts:
                part.to(self.device)
            self._base_row = self._samples(self.before, count, (height // scale, width // scale))
            for part in parts:  # the caller still refers to them
                part.to("cpu")
            self.before = None
        return self._base_row

    def validation_prompts(self) -> list[str]:
        """The recipe's distinct prompts, else the held-out images' captions, in order; the empty prompt if none."""
        found = self.settings.prompts.validation or self.images.captions()
        return list(dict.fromkeys(caption for caption in found if caption)) or [""]

    def _size(self) -> tuple[int, int]:
        """Height and width of validation samples in pixels: those of the first held-out, else training, image."""
        item = self.images[0] if len(self.images) else self.dataset[0]
        height, width = item["image" if "image" in item else "latent"].shape[-2:]
        unit = 1 if "image" in item else self.pipeline.vae_scale_factor
        return height * unit, width * unit

    def _precision(self) -> AbstractContextManager[Any]:
        """Autocast for validation if frozen weights are bfloat16, since trained ones are float32."""
        mixed = self.settings.tune.frozen_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=mixed)

    def export(self, out: Path) -> Path:
        """Write ``out/pipeline`` in diffusers format, with the LoRA merged; returns that folder.

        Unless all weights were tuned, the tuned ones are also written by themselves into ``out/adapters``.
        """
        transformer = self.pipeline.transformer.eval()
        if self.settings.tune.mode != "full":
            save_adapters(self.pipeline, out / "adapters")
            merge_lora(transformer)
        if self.settings.tune.frozen_dtype == "bfloat16":
            transformer.to(torch.bfloat16)
        transformer.to(memory_format=torch.contiguous_format)
        return save_whole(self.pipeline, out / "pipeline")
