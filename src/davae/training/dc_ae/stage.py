"""The DC-AE stage: one phase of decoupled high-resolution adaptation (Chen et al., 2024, section 3.3).

A phase trains some layers of the autoencoder and leaves the others bit-identical, including the running
averages of their batch norms. Phases differ in layers, resolution and loss:

===== ================ ======================== ======================
phase resolution       layers                   loss
===== ================ ======================== ======================
1     low              all                      reconstruction
2     high             around the latent        reconstruction
3     low              the decoder's head       reconstruction and GAN
===== ================ ======================== ======================
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import Dataset

from davae.data import Item, as_item_dataset
from davae.errors import DavaeError
from davae.evaluation import radial_power_spectrum
from davae.evaluation.metrics.names import PSNR, SPECTRUM_DB
from davae.evaluation.metrics.psnr_ssim import pair_metrics
from davae.evaluation.metrics.spectrum import spectra_distance
from davae.latents import ChannelPrefixes
from davae.models.dc_ae import DeepAutoencoder, PlainAutoencoderDC, head_layers, latent_layers
from davae.models.latent_space import encode
from davae.recipes.dc_ae import DcArchitecture, HeadPhase, KlArchitecture, LatentPhase, Phase
from davae.runtime.atomic_files import save_whole
from davae.runtime.pictures import save_shared_rows
from davae.runtime.pixel_budget import in_parts
from davae.runtime.processes import gathered
from davae.training.autoencoder.plain_objective import plain_modules
from davae.training.base.autoencoder_stage import build_kl
from davae.training.data import mean_of_all, rank_share_of_images
from davae.training.stage import Stage
from davae.training.statistics import measure_latents

_PICTURES = 6  # images in a validation picture


def build_autoencoder(shape: DcArchitecture | KlArchitecture) -> DeepAutoencoder:
    """The recipe's network with random weights, on torch's default device."""
    count = len(shape.block_out_channels)
    if isinstance(shape, KlArchitecture):
        return build_kl(shape)
    attention = count - shape.residual_stages
    blocks = ("ResBlock",) * shape.residual_stages + ("EfficientViTBlock",) * attention
    norm, activation = ("batch_norm", "relu") if shape.batch_norm else ("rms_norm", "silu")
    norms = (norm,) * shape.residual_stages + ("rms_norm",) * attention
    activations = (activation,) * shape.residual_stages + ("silu",) * attention
    network = AutoencoderDC if shape.residual_autoencoding else PlainAutoencoderDC
    return network(
        latent_channels=shape.latent_channels,
        attention_head_dim=shape.attention_head_dim,
        encoder_block_types=blocks[:count],
        decoder_block_types=blocks[:count],
        encoder_block_out_channels=tuple(shape.block_out_channels),
        decoder_block_out_channels=tuple(shape.block_out_channels),
        encoder_layers_per_block=tuple(shape.encoder_layers),
        decoder_layers_per_block=tuple(shape.decoder_layers),
        encoder_qkv_multiscales=((),) * count,
        decoder_qkv_multiscales=((),) * count,
        decoder_norm_types=norms[:count],
        decoder_act_fns=activations[:count],
        decoder_conv_act_fn=activation,
        encoder_out_shortcut=shape.latent_shortcuts,
        decoder_in_shortcut=shape.latent_shortcuts,
    )


def trained_layers(autoencoder: DeepAutoencoder, phase: Phase) -> list[nn.Module]:
    """The layers that a phase trains: all, those around the latent, or the decoder's head."""
    if isinstance(phase, LatentPhase):
        return latent_layers(autoencoder, phase.stages)
    if isinstance(phase, HeadPhase):
        return head_layers(autoencoder, phase.stages)
    return [autoencoder]


class DcAeStage(Stage):
    """One phase of training an autoencoder.

    Args:
        autoencoder: what the phase starts from; trained in place.
        phase: the recipe's section; its class determines which layers are trained.
        dataset: training images at the phase's resolution.
        held_out: validation images by resolution in pixels; each validation measures all resolutions.
        prefixes: numbers of channels, from the first ones of which PSNR is measured too.
        scaling_images: maximum number of training images for measuring the latent's scale.
        workers: data loader processes.

    Raises:
        DavaeError: gradient checkpointing is requested for a network that does not support it.
    """

    name = "dc-ae"

    def __init__(
        self,
        autoencoder: DeepAutoencoder,
        phase: Phase,
        dataset: Dataset[Item],
        held_out: Mapping[int, Dataset[Item]],
        *,
        prefixes: Sequence[int] = (),
        scaling_images: int = 1024,
        workers: int = 0,
    ) -> None:
        self.autoencoder, self.phase, self.loop = autoencoder, phase, phase.loop
        self.dataset = as_item_dataset(dataset)
        self.held_out = {side: as_item_dataset(images) for side, images in held_out.items()}
        self.measured_on = tuple(self.held_out.values())
        self.prefixes, self.scaling_images, self.workers = prefixes, scaling_images, workers
        self.can_recompute = autoencoder._supports_gradient_checkpointing
        if phase.loop.gradient_checkpointing:
            if not autoencoder._supports_gradient_checkpointing:
                raise DavaeError(
                    f"loop.gradient_checkpointing of this phase: diffusers' {type(autoencoder).__name__} has none; set "
                    "it to false, lower the phase's loop.batch_size and raise its loop.gradient_accumulation instead"
                )
            autoencoder.enable_gradient_checkpointing()
        if phase.reconstruction.gan.weight:
            torch.manual_seed(phase.loop.seed)
        layers = trained_layers(autoencoder, phase)
        drawn = ChannelPrefixes(autoencoder.config.latent_channels, phase.prefixes.channels, phase.prefixes.share)
        self.objective, self.modules = plain_modules(autoencoder, layers, phase.reconstruction, phase.optimizer, drawn)
        self.foundations = self.objective.reconstruction.foundations()
        self.spectra: dict[int, dict[str, list[float]]] = {}
        """Radial power spectra of the last validation, by resolution: ``frequency``, and the mean power there of
        ``images`` and ``reconstructions``."""

    @torch.no_grad()
    def validate(self, samples: Path, step: int) -> dict[str, float]:
        """PSNR (dB), SSIM and spectral distance (dB), and a picture, at every resolution, and PSNR from prefixes of
        channels, ``psnr_SIDE_first_CHANNELS``. Leaves eval mode on.
        """
        self.objective.eval()  # batch norms must not update on held-out images, whoever the caller
        values: dict[str, float] = {}
        for side in self.held_out:
            images, made, count = self._reconstructed(side)
            rows = {"input": images, "reconstruction": made}
            for channels in self.prefixes:
                rows[f"first {channels}"] = self._reconstructed(side, channels)[1]
                found = pair_metrics(images, rows[f"first {channels}"])[PSNR]
                values[f"{PSNR}_{side}_first_{channels}"] = mean_of_all(found, count)
            save_shared_rows(samples / f"step-{step}-{side}px.png", rows, count, at_most=_PICTURES)
            for name, each in pair_metrics(images, made).items():
                values[f"{name}_{side}"] = mean_of_all(each, count)
            frequency, power = _mean_spectrum(images, count)
            power_made = _mean_spectrum(made, count)[1]
            values[f"{SPECTRUM_DB}_{side}"] = spectra_distance(frequency, power, power_made)
            self.spectra[side] = {
                "frequency": frequency.tolist(),
                "images": power.tolist(),
                "reconstructions": power_made.tolist(),
            }
        return values

    def measure_latents(self) -> None:
        """If the encoder was trained, set the scaling (and KL's shift) to unit variance over all latent elements."""
        model = self.autoencoder.eval()
        if not any(p.requires_grad for p in model.encoder.parameters()):
            return
        mean, std = measure_latents(
            self.dataset,
            lambda images: encode(model, images.to(model.device)),
            model.config.latent_channels,
            most=self.scaling_images,
            workers=self.workers,
        ).of_all_elements()
        factors = {"scaling_factor": 1.0 / std}
        if isinstance(model, AutoencoderKL):
            factors["shift_factor"] = mean
        model.register_to_config(**factors)

    def export(self, out: Path) -> Path:
        """Write ``out/autoencoder``; returns that folder."""
        model = self.autoencoder.eval()
        model.to(memory_format=torch.contiguous_format)
        return save_whole(model, out / "autoencoder")

    def _reconstructed(self, side: int, channels: int | None = None) -> tuple[Tensor, Tensor, int]:
        """This process's held-out images and their clamped reconstructions, ``[n, 3, side, side]`` on the CPU, and the
        number of images over all processes. With ``channels``, from the first ones, the others zero.
        """
        held_out, model = self.held_out[side], self.autoencoder
        images, count = rank_share_of_images(held_out, self.loop.validation_images)
        made = []
        for part in in_parts(images):
            latent = encode(model, part.to(model.device))
            if channels is not None:
                latent[:, channels:] = 0
            made.append(model.decode(latent).sample.float().cpu())
        return images, torch.cat(made).clamp(-1, 1), count


def _mean_spectrum(images: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Frequencies ``[K]`` and mean power ``[K]`` over the ``count`` images of all processes."""
    spectra = [radial_power_spectrum(image[None]) for image in images]
    powers = gathered([power for _, power in spectra], count)
    return spectra[0][0], torch.stack(powers).mean(0)
