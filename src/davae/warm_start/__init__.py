"""Warm start: widening a pretrained transformer, and verifying that it computes the same."""

from davae.diffusion import FlowLoss, detail_weight, structured_loss  # kept for code written for earlier versions
from davae.errors import WarmStartError
from davae.warm_start import known as _known  # noqa: F401  describes the classes
from davae.warm_start.description import ChannelDescription, ChannelPlace, input_layer, output_layer
from davae.warm_start.dummy_inputs import Dummy, dummy
from davae.warm_start.new_channels import channel_parameters, new_channel_masks
from davae.warm_start.probing.probe import probed_description
from davae.warm_start.registry import describe, description_of, dummy_arguments
from davae.warm_start.self_check import WarmStartReport, check_warm_start
from davae.warm_start.widen import widen_channels

__all__ = [
    "ChannelDescription",
    "ChannelPlace",
    "Dummy",
    "FlowLoss",
    "WarmStartError",
    "WarmStartReport",
    "channel_parameters",
    "check_warm_start",
    "describe",
    "description_of",
    "detail_weight",
    "dummy",
    "dummy_arguments",
    "input_layer",
    "new_channel_masks",
    "output_layer",
    "probed_description",
    "structured_loss",
    "widen_channels",
]
