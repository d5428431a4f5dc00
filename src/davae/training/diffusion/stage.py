"""The diffusion stage: a widened transformer is tuned on structured latents (Eq. 12 and 13)."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import DavaeError
from davae.evaluation import sliced_wasserstein
from davae.evaluation.metrics.names import SWD_FINEST
from davae.latents import LatentLayout
from davae.pipelines.lora import attach_lora, attached_lora, merge_lora
from davae.pipelines.quantization import recompute
from davae.pipelines.saving.adapters import save_adapters
from davae.recipes.settings import DiffusionSettings
from davae.runtime.atomic_files import atomic_folder, atomic_write
from davae.runtime.pictures import save_rows
from davae.runtime.processes import gathered_in_first, is_first, share, start_processes
from davae.training.diffusion.conditioning import ClassMap, PromptEmbeddings
from davae.training.diffusion.inputs import Inputs, details_seed_of, encode_images
from davae.training.diffusion.objective import DiffusionObjective, noise_process
from davae.training.diffusion.tuning import select_trained
from davae.training.diffusion.validation import (
    decoded_latents,
    generate_classes,
    generate_prompts,
    has_previews,
    held_out_loss,
    preview,
)
from davae.training.engine.offload import BlockOffload
from davae.training.engine.tensors import restore_module
from davae.training.stage import Stage, TrainedModule
from davae.warm_start import new_channel_masks

logger = logging.getLogger(__name__)
_PICTURES = 12  # in a row
_SHOWN = 48


class DiffusionStage(Stage):
    """Tunes the transformer of a pipeline on the latents of its autoencoder.

    Args:
        pipeline: an upgraded pipeline (or a base one) of a known family; its text encoders are not used.
        layout: its base and detail channels.
        settings: the recipe's section.
        inputs: what it is trained on and measured with.
        before: the pipeline before the upgrade, for samples to compare with; they are made here, and it is not kept.
            To save memory it loses its transformer if ``tune.quantization`` is set.
        reopen: makes the widened transformer as it was given, in main memory; needed for ``tune.quantization``, whose
            result has the base's own weights.
        finish: completes the exported pipeline's folder, such as by text encoders that are not in memory.

    Raises:
        DavaeError: settings do not fit, such as ``loss.base_distillation`` without ``before``.
    """

    name = section = "diffusion"
    other_sections: Sequence[str] = ("autoencoder",)

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        layout: LatentLayout,
        settings: DiffusionSettings,
        inputs: Inputs,
        *,
        before: DiffusionPipeline | None = None,
        reopen: Callable[[], ModelMixin] | None = None,
        finish: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        self.pipeline, self.layout, self.settings, self.loop = pipeline, layout, settings, settings.loop
        self.inputs, self.reopen, self.finish = inputs, reopen, finish
        self.family, self.conditions, self.images = inputs.family, inputs.conditions, inputs.images
        self.dataset, self.workers, self.timeout_s = inputs.dataset, inputs.workers, inputs.timeout_s
        self.measured_on = (self.images,)
        self.vae = pipeline.vae.eval().requires_grad_(False)
        self.device = start_processes().device
        prompts = self.conditions if isinstance(self.conditions, PromptEmbeddings) else None

        self._base_row = None if before is None or not self.can_measure else self._base_samples(before)
        tune, transformer = settings.tune, pipeline.transformer
        teacher = None
        if settings.loss.base_distillation:
            if before is None:
                raise DavaeError("loss.base_distillation is for an upgrade, which has a frozen base: set it to 0")
            teacher = deepcopy(before.transformer).eval().requires_grad_(False)  # the widened one shares its weights
        if before is not None and tune.quantization != "none":
            before.register_modules(transformer=None)  # its weights are those of the widened one
            self.family.join_parts(before)
        rates = select_trained(transformer, self.family, layout, settings, self.device)
        if settings.loop.gradient_checkpointing:
            transformer.enable_gradient_checkpointing(recompute if tune.quantization == "8bit" else None)
        self.offload = BlockOffload(transformer, self.device) if tune.offload_blocks else None
        self.objective = DiffusionObjective(
            self.family,
            transformer,
            layout,
            noise_process(self.family, pipeline, layout, settings.loss, settings.timesteps),
            settings.loss,
            encode=partial(encode_images, self.family, self.vae, details_seed=details_seed_of(settings)),
            unconditional=prompts.unconditional if prompts else None,
            dropout=settings.prompts.dropout if prompts else 0.0,
            guidance=settings.prompts.guidance,
            teacher=teacher,
        )
        only_new = tune.mode == "new_channels"
        masks = new_channel_masks(transformer, layout) if only_new or rates else {}
        new = {f"transformer.{name}": mask for name, mask in masks.items()}
        self.modules = [
            TrainedModule(
                "model",
                self.objective,
                settings.optimizer,
                {f"transformer.{name}": rate for name, rate in rates.items()},
                gradient_masks=new if only_new else {},
                rate_masks=new if rates else {},
            )
        ]

    def to(self, device: torch.device) -> None:
        """Set the device; the autoencoder stays on the CPU unless training needs it."""
        self.device = device
        self._rest_autoencoder()

    def _rest_autoencoder(self) -> None:
        """Move the autoencoder off the device between validations, unless images are encoded during training."""
        self.vae.to(self.device if self.inputs.encodes_while_training else "cpu")

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """Held-out loss at fixed noise, sliced Wasserstein distance of samples; a sheet of them and of the base's."""
        device = self.device
        self.vae.to(device)
        with self._precision():
            values = held_out_loss(
                self.objective,
                self.inputs.measured,
                batch_size=self.loop.batch_size,
                step=self.loop.steps,
                seed=self.loop.seed,
                device=device,
            )
            count = self.loop.validation_images
            with decoded_latents(self.vae) as latents:
                made = self._samples(self.pipeline, count, self._size())
            values |= self._preview_drift(latents, count)
        self._rest_autoencoder()
        if not is_first():  # the first process has all samples
            return values
        rows = {f"samples {i // _PICTURES}": made[i : i + _PICTURES] for i in range(0, min(count, _SHOWN), _PICTURES)}
        if self._base_row is not None:
            rows["base"] = self._base_row[:_PICTURES]
        names = self._names(count)
        labels = [names[i : i + _PICTURES] for i in range(0, min(count, _SHOWN), _PICTURES)]
        save_rows(samples / f"step-{step}.png", rows, [*labels, names[:_PICTURES]])
        if isinstance(self.conditions, PromptEmbeddings):
            atomic_write(samples / "prompts.txt", "\n".join(self.inputs.validation_prompts) + "\n")
        if len(self.images):
            shown = [self.images[i]["image"] for i in range(min(count, len(self.images)))]
            real = torch.stack([image for image in shown if image.shape == made.shape[1:]] or shown[:1])
            if real.shape[1:] == made.shape[1:]:
                values[SWD_FINEST] = sliced_wasserstein(made, real)[0]
        return values

    def _names(self, count: int) -> list[str]:
        """The classes or prompts of the samples, in order."""
        names = self.inputs.validation_prompts
        if isinstance(self.conditions, ClassMap):
            known = {number: name for name, number in self.pipeline.labels.items()}
            names = [known.get(number, str(number)) for number in self.conditions.known]
        return [names[i % len(names)] for i in range(count)]

    def _preview_drift(self, latents: list[Tensor], count: int) -> dict[str, float]:
        """How far the base part of samples has moved from the base's own samples of the same noise and class.

        ``preview_drift`` is the root mean square difference of both decoded by the base, images in [-1, 1]: 0 before
        the first step of a warm start. Only of class-conditional pipelines, which draw the base's noise first, and of
        the first process's share.

        Args:
            latents: what the autoencoder decoded for the samples of this process, in order.
            count: number of samples of all processes.
        """
        base = self._base_row
        if base is None or not len(base) or not latents or not self._previews():
            return {}
        pairs = [(z, base[i]) for z, i in zip(torch.cat(latents), share(count), strict=True) if i < len(base)]
        made = [preview(self.vae, z[None])[0].cpu() for z, _ in pairs]
        errors = [(ours - theirs).square().mean() for ours, (_, theirs) in zip(made, pairs, strict=True)]
        return {"preview_drift": float(torch.stack(errors).mean().sqrt())}

    def _previews(self) -> bool:
        return isinstance(self.conditions, ClassMap) and has_previews(self.vae)

    def _samples(self, pipeline: DiffusionPipeline, count: int, size: tuple[int, int]) -> Tensor:
        """Samples ``[count, 3, H, W]`` in [-1, 1], cycling through the data's classes or the validation prompts.

        Each process generates its share; the first one gets all, the others none.
        """
        sample, seed, mine = self.settings.sample, self.loop.seed, share(count)
        if isinstance(self.conditions, ClassMap):
            made = generate_classes(pipeline, self.conditions.known, count, sample, seed=seed, positions=mine)
        else:
            prompts = self.inputs.validation_prompts
            made = generate_prompts(
                pipeline,
                [prompts[i % len(prompts)] for i in range(count)],
                size,
                sample,
                seed=seed,
                max_length=self.settings.prompts.max_length,
                positions=mine,
                embeddings=self.conditions.kept,
            )
        found = gathered_in_first(list(made.cpu()), count)
        return torch.stack(found) if found else made[:0]

    def _base_samples(self, before: DiffusionPipeline) -> Tensor:
        """Samples of the base pipeline at its own resolution.

        Where the training saves memory its blocks rest in main memory, which they share with the widened transformer.
        """
        height, width = self._size()
        scale = getattr(self.pipeline.vae, "scale", 1)
        parts = (before.transformer, before.vae)
        offload = None
        if self.settings.tune.quantization != "none" or self.settings.tune.offload_blocks:
            offload = BlockOffload(before.transformer.requires_grad_(False), self.device, pin=False)
        for part in parts:
            part.to(self.device)
        most = _SHOWN if self._previews() else _PICTURES  # previews are compared with them
        with self._precision():
            made = self._samples(before, min(self.loop.validation_images, most), (height // scale, width // scale))
        if offload is not None:
            offload.remove()
        for part in parts:  # a caller may still refer to them
            part.to("cpu")
        return made

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

    def _unquantized(self, out: Path) -> ModelMixin:
        """The tuned transformer with the base's own weights, opened anew, in main memory."""
        assert self.reopen is not None
        tuned, plain = self.pipeline.transformer, self.reopen()
        attached = attached_lora(tuned)
        if attached is not None:
            attach_lora(plain, attached[1], attached[0])
        select_trained(plain, self.family, self.layout, self.settings)
        learnt = {name: p.detach().cpu() for name, p in tuned.named_parameters() if p.requires_grad}
        restore_module(plain, learnt, out)
        return plain

    def export(self, out: Path) -> Path:
        """Write ``out/pipeline`` in diffusers format, with the LoRA merged; returns that folder.

        Unless all weights were tuned, the tuned ones are also written by themselves into ``out/adapters``. Frozen
        weights are the base's, also where they were quantised.
        """
        if self.offload is not None:
            self.offload.remove()
            self.pipeline.transformer.to("cpu")
        if self.settings.tune.quantization != "none":
            self.pipeline.register_modules(transformer=self._unquantized(out))
            self.family.join_parts(self.pipeline)
        transformer = self.pipeline.transformer.eval()
        if self.settings.tune.mode != "full":
            save_adapters(self.pipeline, out / "adapters")
            merge_lora(transformer)
        if self.settings.tune.frozen_dtype == "bfloat16":
            transformer.to(torch.bfloat16)
        transformer.to(memory_format=torch.contiguous_format)
        with atomic_folder(out / "pipeline") as folder:
            self.pipeline.save_pretrained(folder)
            self.finish(folder)
        return out / "pipeline"
