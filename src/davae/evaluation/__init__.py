"""Measuring images and latents: reconstruction, generation, spectra, structure of the latent."""

from davae.evaluation.latent_space.projection import PrincipalAxes, project_latents
from davae.evaluation.latent_space.separability import linear_probe, linear_probe_accuracy, nearest_neighbour_accuracy
from davae.evaluation.metrics.psnr_ssim import psnr, ssim
from davae.evaluation.metrics.sliced_wasserstein import PatchSet, sliced_wasserstein, wasserstein_1d
from davae.evaluation.metrics.spectrum import log_spectral_distance, radial_power_spectrum

__all__ = [
    "PatchSet",
    "PrincipalAxes",
    "linear_probe",
    "linear_probe_accuracy",
    "log_spectral_distance",
    "nearest_neighbour_accuracy",
    "project_latents",
    "psnr",
    "radial_power_spectrum",
    "sliced_wasserstein",
    "ssim",
    "wasserstein_1d",
]
