"""The autoencoder stage of a new base: a plain ``AutoencoderKL``, trained from scratch."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin
from torch.utils.data import Dataset

from davae.data import Item, as_item_dataset
from davae.latents import ChannelStatistics
from davae.recipes.dc_ae import KlArchitecture
from davae.recipes.settings import BaseAutoencoderArchitecture, BaseAutoencoderSettings
from davae.runtime.atomic_files import save_whole
from davae.runtime.pictures import save_shared_rows
from davae.runtime.pixel_budget import in_parts
from davae.training.autoencoder.plain_objective import plain_modules
from davae.training.data import mean_psnr, rank_share_of_images
from davae.training.stage import Stage
from davae.training.statistics import measure_latents


def build_kl(shape: BaseAutoencoderArchitecture | KlArchitecture) -> AutoencoderKL:
    """An ``AutoencoderKL`` of a recipe's architecture with random weights, without quant convolutions."""
    levels = len(shape.block_out_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(shape.block_out_channels),
        latent_channels=shape.latent_channels,
        layers_per_block=shape.layers_per_block,
        norm_num_groups=shape.norm_num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        shift_factor=0.0,
    )


def set_factors(vae: ModelMixin, measured: ChannelStatistics) -> None:
    """Set scaling and shift factor so that scaled latents have mean 0 and variance 1 over all elements."""
    mean, std = measured.of_all_elements()
    vae.register_to_config(scaling_factor=1.0 / std, shift_factor=mean)


class BaseAutoencoderStage(Stage):
    """Trains a plain ``AutoencoderKL`` and measures its scaling and shift factors.

    Args:
        settings: the recipe's section.
        dataset: training images, at any scales.
        whole: the images at the transformer's resolution; the factors are measured on these.
        held_out: validation images.
        workers: data loader processes.
        timeout_s: seconds to wait for a batch of images; 0 waits forever.
    """

    name = "base autoencoder"
    section = "autoencoder"
    other_sections = ("transformer",)
    can_recompute = False

    def __init__(
        self,
        settings: BaseAutoencoderSettings,
        dataset: Dataset[Item],
        whole: Dataset[Item],
        held_out: Dataset[Item],
        *,
        workers: int = 0,
        timeout_s: float = 0.0,
    ) -> None:
        torch.manual_seed(settings.loop.seed)
        self.autoencoder = build_kl(settings.architecture)
        self.settings, self.loop = settings, settings.loop
        self.dataset, self.whole = as_item_dataset(dataset), as_item_dataset(whole)
        self.held_out = as_item_dataset(held_out)
        self.measured_on = (self.held_out,)
        self.workers, self.timeout_s = workers, timeout_s
        self.objective, self.modules = plain_modules(
            self.autoencoder, [self.autoencoder], settings.reconstruction, settings.optimizer
        )
        self.foundations = self.objective.reconstruction.foundations()

    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """PSNR (dB) of held-out images."""
        images, count = rank_share_of_images(self.held_out, self.loop.validation_images)
        device, made = self.autoencoder.device, []
        for part in in_parts(images):
            made.append(self.autoencoder(part.to(device), sample_posterior=False).sample.cpu())
        reconstruction = torch.cat(made)
        rows = {"input": images, "reconstruction": reconstruction}
        save_shared_rows(samples / f"step-{step}.png", rows, count)
        return {"psnr": mean_psnr(images, reconstruction, count)}

    def measure_latents(self) -> None:
        """Set the scaling and shift factors so that scaled latents have mean 0 and variance 1."""
        vae = self.autoencoder.eval()
        found = measure_latents(
            self.whole,
            lambda images: vae.encode(images.to(vae.device)).latent_dist.mean,
            vae.config.latent_channels,
            workers=self.workers,
            timeout_s=self.timeout_s,
        )
        set_factors(vae, found)

    def export(self, out: Path) -> Path:
        """Write ``out/vae``; returns that folder."""
        self.autoencoder.eval()
        self.autoencoder.to(memory_format=torch.contiguous_format)
        return save_whole(self.autoencoder, out / "vae")
