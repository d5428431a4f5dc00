"""Class-conditional images from a flow-matching transformer and a VAE."""

import difflib
import math
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from davae.diffusion.flow_matching import guide, is_guided
from davae.diffusion.schedulers import check_flow_scheduler, scheduler_step, set_sigmas, shifted_scheduler
from davae.errors import DavaeError
from davae.latents import latent_affine, to_raw
from davae.models.remote_code import save_custom_code

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class ClassConditionalPipeline(DiffusionPipeline):
    """Generates images of given classes by flow matching, from noise (t = 0) to data (t = 1).

    The same class serves a base model and its upgrade: the image size and the latent channels follow from the
    VAE and the transformer. With the same seed an upgraded pipeline starts from the base's noise, followed by
    noise for the detail channels.

    Args:
        vae: a diffusers image autoencoder or :class:`davae.AutoencoderDA`.
        transformer: :class:`davae.LightningDiTTransformer2DModel`, or one with the same ``forward``.
        scheduler: for flow matching: Euler, Heun, LCM, or DPM-Solver++ and UniPC configured for it. Its `shift` applies
            to sigma = 1 - t: a shift of 0.3 in t is 1 / 0.3 here.
        id2label: names of the classes by number, stored in the pipeline's configuration.

    Raises:
        DavaeError: the VAE's latent and the transformer have different numbers of channels.
    """

    __module__ = "davae"
    model_cpu_offload_seq = "transformer->vae"

    def __init__(
        self,
        vae: ModelMixin,
        transformer: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: Mapping[int, str] | Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, transformer=transformer, scheduler=scheduler)
        # String keys, as in JSON, so that the configuration is the same before saving and after loading.
        self.register_to_config(id2label=id2label and {str(k): v for k, v in id2label.items()})
        if vae is not None and transformer is not None:
            self._check_channels()

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers; also writes this class's code to ``pipeline.py``, for use without davae:

        ``DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)``.
        """
        if type(self).__module__ == "davae":
            save_custom_code(type(self).__name__, Path(save_directory) / "pipeline.py")
        super().save_pretrained(save_directory, *args, **kwargs)

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent position along each side."""
        config = self.vae.config
        widths = config.get("block_out_channels") or config["encoder_block_out_channels"]
        return int(2 ** (len(widths) - 1))

    @property
    def labels(self) -> dict[str, int]:
        """Class numbers by name; empty if the pipeline has no names."""
        return {name: int(number) for number, name in (self.config.id2label or {}).items()}

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str],
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        timestep_shift: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one image for each label.

        Args:
            class_labels: numbers or names: one, or one for each image. Number `num_classes` means no class.
            height: image height in pixels; the trained size if None.
            width: image width in pixels; the trained size if None.
            num_inference_steps: steps of the scheduler. The official samplers count the grid's points, one
                more: their 250 is 249 here.
            guidance_scale: classifier-free guidance; 1 turns it off and halves the computation.
            guidance_interval: guide only while ``start <= t <= end``, where t = 0 is noise.
            guidance_channels: guide only this many latent channels, the first ones; None guides all.
            timestep_shift: warp the grid by ``s t / (1 + (s - 1) t)``, 0.3 in the official samplers; None uses
                the scheduler's shift.
            generator: one for all images, or a list with one for each.
            latents: noise to start from, [B, C, h, w], instead of drawing it.
            output_type: "pil", "np" (float [B, H, W, 3] in [0, 1]), "pt" (float [B, 3, H, W] in [0, 1]) or
                "latent" (float32 [B, C, h, w], scaled as the transformer sees it).
            return_dict: return an output object with `.images`; otherwise a tuple of one element.
            callback_on_step_end: called as ``callback(pipeline, step, timestep, {"latents": latents})`` after
                each step; a dictionary it returns may hold new `latents`.

        Raises:
            DavaeError: an unknown label, an invalid argument or size, or parts that do not fit together.
        """
        if output_type not in OUTPUT_TYPES:
            raise DavaeError(f"output_type '{output_type}' is unknown: choose one of {', '.join(OUTPUT_TYPES)}")
        if num_inference_steps < 1:
            raise DavaeError(f"num_inference_steps is {num_inference_steps}: at least 1 is needed")
        if timestep_shift is not None and not 0 < timestep_shift < math.inf:
            raise DavaeError(f"timestep_shift is {timestep_shift}: it must be above 0, and 1 changes nothing")
        self._check_channels()
        check_flow_scheduler(self.scheduler)
        device = self._execution_device
        labels = torch.tensor(self._label_numbers(class_labels), device=device)  # [B]
        if latents is None:
            latents = self._noise(len(labels), *self._grid(height, width), generator, device)
        else:
            latents = self._given_latents(latents, len(labels), height, width).to(device, torch.float32)

        scheduler = self.scheduler
        if timestep_shift is not None:
            scheduler = shifted_scheduler(scheduler, 1 / timestep_shift)
        sigmas = set_sigmas(scheduler, num_inference_steps, device)
        with self.progress_bar(total=len(sigmas)) as progress:
            for step, timestep in enumerate(scheduler.timesteps):
                velocity = guided_velocity(
                    self.transformer,
                    latents.to(self.transformer.dtype),
                    sigmas[step],
                    labels,
                    guidance_scale=guidance_scale,
                    guidance_interval=guidance_interval,
                    guidance_channels=guidance_channels,
                )
                latents = scheduler_step(scheduler, velocity, timestep, latents, generator)
                if callback_on_step_end is not None:
                    changed = callback_on_step_end(self, step, timestep, {"latents": latents})
                    latents = (changed or {}).get("latents", latents)
                progress.update()

        images = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        raw = to_raw(latents, *latent_affine(self.vae.config, latents.shape[1]))
        images = self.vae.decode(raw.to(self.vae.dtype)).sample.float()  # [B, 3, H, W]
        return VaeImageProcessor(self.vae_scale_factor).postprocess(images, output_type=output_type)

    def _noise(
        self,
        count: int,
        rows: int,
        columns: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
    ) -> Tensor:
        # Base channels first and separately: the base pipeline draws the same noise from this generator.
        channels = int(self.transformer.config.in_channels)
        layout = getattr(self.vae, "layout", None)
        parts = [channels] if layout is None else [layout.base_channels, layout.detail_channels]
        if isinstance(generator, list) and len(generator) != count:
            raise DavaeError(f"{len(generator)} generators for {count} labels: give one, or one for each label")
        options = {"generator": generator, "device": device, "dtype": torch.float32}
        return torch.cat([randn_tensor((count, part, rows, columns), **options) for part in parts], dim=1)

    def _grid(self, height: int | None, width: int | None) -> tuple[int, int]:
        # Latent rows and columns of an image of that size
        trained = self.transformer.config.sample_size * self.vae_scale_factor
        unit = self.vae_scale_factor * self.transformer.config.patch_size
        for name, size in (("height", height), ("width", width)):
            if size is not None and (size < unit or size % unit):
                nearest = max(unit, round(size / unit) * unit)
                raise DavaeError(f"{name} {size} is not a multiple of {unit} pixels; the nearest is {nearest}")
        return (height or trained) // self.vae_scale_factor, (width or trained) // self.vae_scale_factor

    def _given_latents(self, latents: Tensor, count: int, height: int | None, width: int | None) -> Tensor:
        rows, columns = latents.shape[-2:]
        if height is not None or width is not None:
            rows, columns = self._grid(height, width)
        expected = (count, self.transformer.config.in_channels, rows, columns)
        if tuple(latents.shape) != expected:
            raise DavaeError(f"latents have shape {tuple(latents.shape)}, expected {expected}")
        return latents

    def _label_numbers(self, class_labels: int | str | Sequence[int | str]) -> list[int]:
        wanted = [class_labels] if isinstance(class_labels, int | str) else list(class_labels)
        if not wanted:
            raise DavaeError("class_labels is empty: give at least one label")
        return [self._label_number(label) for label in wanted]

    def _label_number(self, label: int | str) -> int:
        if isinstance(label, str):
            name, numbers = label.lower(), {name.lower(): number for name, number in self.labels.items()}
            if not numbers:
                raise DavaeError(f"this pipeline has no class names, so '{label}' must be given by number")
            if name not in numbers:
                near = difflib.get_close_matches(name, numbers, n=3, cutoff=0.5) or sorted(numbers)[:5]
                raise DavaeError(f"class '{label}' is unknown; the nearest names are {', '.join(near)}")
            return numbers[name]
        number, classes = operator.index(label), self.transformer.config.num_classes
        if not 0 <= number <= classes:
            raise DavaeError(
                f"class label {number} is out of range: the model knows 0 to {classes - 1}, and {classes} for no class"
            )
        return number

    def _check_channels(self) -> None:
        latent, transformer = self.vae.config.latent_channels, self.transformer.config.in_channels
        if latent != transformer:
            raise DavaeError(
                f"the VAE's latent has {latent} channels, the transformer takes {transformer}: an upgraded "
                "VAE needs a transformer widened for it, see davae.upgrade_pipeline"
            )


def guided_velocity(
    transformer: ModelMixin,
    latents: Tensor,
    sigma: float,
    class_labels: Tensor,
    *,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: int | None = None,
) -> Tensor:
    """Guided velocity ``noise - data`` of a class-conditional transformer at one noise level, in float32.

    If guidance is active, both predictions come from one pass over a doubled batch; otherwise only the conditional
    one is computed.

    Args:
        transformer: see :func:`predict_velocity`; its ``config.num_classes`` is the null label.
        latents: x_sigma, [B, C, h, w].
        sigma: noise level in [0, 1], the same for the whole batch.
        class_labels: [B] int64.
        guidance_scale: see :func:`davae.diffusion.guide`.
        guidance_interval: of ``t = 1 - sigma``, see :func:`davae.diffusion.is_guided`.
        guidance_channels: see :func:`davae.diffusion.guide`.
    """
    guided = guidance_scale != 1 and is_guided(1 - sigma, guidance_interval)
    if guided:
        latents = torch.cat([latents, latents])
        null_labels = torch.full_like(class_labels, transformer.config.num_classes)
        class_labels = torch.cat([class_labels, null_labels])
    sigmas = torch.full((len(latents),), sigma, dtype=torch.float32, device=latents.device)
    velocity = predict_velocity(transformer, latents, sigmas, class_labels).float()
    if not guided:
        return velocity
    conditional, unconditional = velocity.chunk(2)
    return guide(conditional, unconditional, guidance_scale, guidance_channels)


def predict_velocity(transformer: ModelMixin, noisy: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
    """Velocity ``noise - data`` of LightningDiT, which itself predicts ``data - noise`` at ``t = 1 - sigma``.

    Args:
        transformer: called as ``transformer(noisy, t, class_labels).sample``.
        noisy: x_sigma, [B, C, h, w].
        sigma: noise level in [0, 1], [B].
        class_labels: [B] int64.
    """
    return -transformer(noisy, 1 - sigma, class_labels).sample
