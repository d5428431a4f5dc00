"""The mathematics of stage 2, with one convention: ``sigma`` is the noise level, a velocity is ``noise - data``.

Modules: `flow_matching` and `noise` (adding noise), `timesteps` (sampling noise levels), `loss` (Eq. 13),
`detail_schedule` (Eq. 12), `variational_bound` (learned variances), `schedulers` (sampling from noise to data).
"""

from davae.diffusion.detail_schedule import detail_weight
from davae.diffusion.flow_matching import (
    guide,
    interpolate,
    is_guided,
    noise_from_velocity,
    velocity_of,
    x0_from_velocity,
)
from davae.diffusion.loss import FlowLoss, cosine_loss, min_snr_weight, structured_loss
from davae.diffusion.noise import DdpmProcess, FlowProcess, NoiseProcess, NoisySample
from davae.diffusion.schedulers import scheduler_step, set_sigmas
from davae.diffusion.timesteps import sample_sigmas, sample_unit, sd3_sigma_table, shift_sigmas
from davae.diffusion.variational_bound import VariationalBound

__all__ = [
    "DdpmProcess",
    "FlowLoss",
    "FlowProcess",
    "NoiseProcess",
    "NoisySample",
    "VariationalBound",
    "cosine_loss",
    "detail_weight",
    "guide",
    "interpolate",
    "is_guided",
    "min_snr_weight",
    "noise_from_velocity",
    "sample_sigmas",
    "sample_unit",
    "scheduler_step",
    "sd3_sigma_table",
    "set_sigmas",
    "shift_sigmas",
    "structured_loss",
    "velocity_of",
    "x0_from_velocity",
]
