"""Warm start: widening a pretrained transformer, the proof that nothing changed, and the loss schedule."""

from davae.warm_start import known as _known  # noqa: F401  describes the classes
from davae.warm_start.channel_places import ChannelDescription, ChannelPlace, input_layer, output_layer
from davae.warm_start.dummy_inputs import Dummy, dummy
from davae.warm_start.errors import WarmStartError
from davae.warm_start.loss import (
    FlowLoss,
    cosine_loss,
    min_snr_weight,
    predicted_data,
    structured_loss,
    structured_mean,
)
from davae.warm_start.new_channels import channel_parameters, new_channel_masks
from davae.warm_start.probing import probed_description
from davae.warm_start.registry import describe, described_classes, description_of, dummy_arguments
from davae.warm_start.schedule import detail_weight
from davae.warm_start.self_check import WarmStartReport, check_warm_start
from davae.warm_start.timesteps import (
    SigmaTable,
    sample_sigmas,
    sample_unit,
    sd3_sigma_table,
    shift_sigmas,
)
from davae.warm_start.widen import widen_channels

__all__ = [
    "ChannelDescription",
    "ChannelPlace",
    "Dummy",
    "FlowLoss",
    "SigmaTable",
    "WarmStartError",
    "WarmStartReport",
    "channel_parameters",
    "check_warm_start",
    "cosine_loss",
    "describe",
    "described_classes",
    "description_of",
    "detail_weight",
    "dummy",
    "dummy_arguments",
    "input_layer",
    "min_snr_weight",
    "new_channel_masks",
    "output_layer",
    "predicted_data",
    "probed_description",
    "sample_sigmas",
    "sample_unit",
    "sd3_sigma_table",
    "shift_sigmas",
    "structured_loss",
    "structured_mean",
    "widen_channels",
]
