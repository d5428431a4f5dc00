"""The autoencoder stage of an upgrade: detail encoders and joint decoders of an :class:`AutoencoderDA`."""

import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from davae.data import Item, as_item_dataset
from davae.data.in_memory import WithKept
from davae.evaluation.metrics.names import BASE_ENLARGED, DECODER_ALONE
from davae.latents import grouped_mean
from davae.models import AutoencoderDA
from davae.recipes.settings import AutoencoderSettings
from davae.runtime.atomic_files import save_whole
from davae.runtime.pictures import save_shared_rows
from davae.runtime.pixel_budget import in_parts
from davae.runtime.processes import start_processes
from davae.runtime.resizing import upscaled
from davae.training.autoencoder.losses import make_gan_loss
from davae.training.autoencoder.objective import StructuredObjective, alignment_layout, levels_that_learn
from davae.training.data import mean_of_all, mean_psnr, rank_share_of_images
from davae.training.stage import Stage, TrainedModule
from davae.training.statistics import measure_latents

logger = logging.getLogger(__name__)


class AutoencoderStage(Stage):
    """Trains an :class:`AutoencoderDA`, all levels together or the last alone; the base is frozen.

    Args:
        autoencoder: trained in place.
        settings: the recipe's section; with several levels, ``settings.levels`` says which are trained.
        dataset: training images at the last level's resolution.
        held_out: validation images.
        workers: data loader processes.
        timeout_s: seconds to wait for a batch of images; 0 waits forever.
        cache_latents: make the frozen latents below the trained levels once and keep them in memory, and with
            ``settings.target`` ``base`` the targets too, those of mirrored images as well. Images must not be cropped
            at random.
    """

    name = section = "autoencoder"
    other_sections = ("diffusion",)
    objective_class: type[StructuredObjective] = StructuredObjective

    def __init__(
        self,
        autoencoder: AutoencoderDA,
        settings: AutoencoderSettings,
        dataset: Dataset[Item],
        held_out: Dataset[Item],
        *,
        workers: int = 0,
        timeout_s: float = 0.0,
        cache_latents: bool = False,
    ) -> None:
        self.autoencoder, self.settings, self.loop = autoencoder, settings, settings.loop
        self.dataset, self.held_out = as_item_dataset(dataset), as_item_dataset(held_out)
        self.measured_on = (self.held_out,)
        self.workers, self.timeout_s = workers, timeout_s
        autoencoder.train_levels(together=settings.levels == "together", detail_encoders=settings.train_detail_encoder)
        self.learning = levels_that_learn(autoencoder)
        if len(autoencoder.levels) > 2:
            numbers = " and ".join(map(str, self.learning))
            self.name = f"autoencoder, level {numbers}"
        if settings.loop.gradient_checkpointing:
            autoencoder.enable_gradient_checkpointing()
        gan_losses, modules = [], []
        for number in self.learning:
            name = "discriminator" if len(self.learning) == 1 else f"discriminator_level{number}"
            gan_loss, trained = make_gan_loss(settings.reconstruction.gan, name)
            gan_losses.append(gan_loss)
            modules += trained
        self.objective = self.objective_class(
            autoencoder,
            settings.alignment,
            settings.reconstruction,
            gan_losses,
            target=settings.target,
            detail_noise=settings.detail_noise,
            alone=settings.decoder_alone,
            rescale_details=settings.rescale_details,
        )
        self.foundations = self.objective.reconstruction.foundations()
        if cache_latents:
            autoencoder.to(start_processes().device)
            made, shown = self.objective.keepable(), f"{self.name}: images encoded"
            self.dataset = WithKept(self.dataset, made, workers=workers, timeout_s=timeout_s, shown=shown)
        gan = settings.reconstruction.gan
        adaptive = settings.alignment.adaptive or (gan.weight > 0 and gan.adaptive)
        model = TrainedModule("model", self.objective, settings.optimizer, can_be_sharded=not adaptive)
        self.modules = [model, *modules]

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """PSNR (dB) of the reconstruction, of the enlarged base and lower levels, and without the last level's details;
        ``alignment``, the mean squared error of group-averaged details, also relative to the target's mean square.
        """
        vae = self.autoencoder
        images, count = rank_share_of_images(self.held_out, self.loop.validation_images)
        lower = [level.number for level in vae.levels[1:-1]]
        names = ["input", BASE_ENLARGED, *(f"level {n}, enlarged" for n in lower)]
        alone = "without the last details" if lower else DECODER_ALONE
        rows: dict[str, list[Tensor]] = {name: [] for name in [*names, alone, "reconstruction"]}
        aligned, energy = [], []  # mean squares per image
        layout = alignment_layout(vae, self.settings.alignment)
        for part in in_parts(images):
            part = part.to(vae.device, vae.dtype)
            below, z_d = vae.encode_prefix(part), vae.encode_own_details(part).mean
            latent = vae.encode(part).latent_dist.mode() if lower else None
            rows["input"].append(part.cpu())
            rows[BASE_ENLARGED].append(upscaled_base(vae, part).cpu())
            for number in lower:
                assert latent is not None
                made = vae.decode_level(latent, number)
                rows[f"level {number}, enlarged"].append(upscaled(made, part.shape[-2:]).cpu())
            rows["reconstruction"].append(vae.decode_structured(below, z_d).cpu())
            rows[alone].append(vae.decode_alone(below).cpu())
            target = vae.alignment_target(below[:, : layout.base_channels]).float()
            projected = grouped_mean(z_d.float(), layout.base_channels)
            aligned.append((projected - target).square().flatten(1).mean(1).cpu())
            energy.append(target.square().flatten(1).mean(1).cpu())
        whole = {name: torch.cat(parts) for name, parts in rows.items()}
        save_shared_rows(samples / f"step-{step}.png", whole, count)
        compared = {"": "reconstruction", "_base_upscaled": BASE_ENLARGED, "_no_details": alone}
        compared |= {f"_level{n}_upscaled": f"level {n}, enlarged" for n in lower}
        figures = {f"psnr{name}": mean_psnr(images, whole[row], count) for name, row in compared.items()}
        if not vae.uses_details:
            return figures
        alignment = mean_of_all(torch.cat(aligned), count)
        relative = alignment / mean_of_all(torch.cat(energy), count)
        return {**figures, "alignment": alignment, "alignment_relative": relative}

    def measure_latents(self) -> None:
        """Store mean and standard deviation of each detail channel of the trained levels in the autoencoder's config.

        A level that a transformer may have been tuned on keeps its own.
        """
        vae = self.autoencoder.eval()
        found = measure_latents(
            self.dataset,
            lambda images: vae.encode_details(images.to(vae.device, vae.dtype)).mean,
            vae.layout.detail_channels,
            most=self.settings.statistics_images,
            workers=self.workers,
            timeout_s=self.timeout_s,
        )
        counts = [level.own_layout.detail_channels for level in vae.autoencoders()]
        for number, (mean, std) in enumerate(zip(found.mean.split(counts), found.std.split(counts)), start=1):
            if number in self.learning:
                vae.set_detail_statistics(mean, std, level=number)

    def export(self, out: Path) -> Path:
        """Write ``out/autoencoder``; returns that folder."""
        self.autoencoder.eval()
        self.autoencoder.to(memory_format=torch.contiguous_format)
        return save_whole(self.autoencoder, out / "autoencoder")


@torch.no_grad()
def upscaled_base(vae: AutoencoderDA, images: Tensor) -> Tensor:
    """The base's own reconstruction of ``[B, 3, H, W]`` images, enlarged bicubically to ``[B, 3, H, W]``."""
    return upscaled(vae.decode_base(vae.encode_base(images)), images.shape[-2:])
