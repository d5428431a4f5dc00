"""Start values of a new level's two blocks from what the level stands on."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from davae.latents import LatentLayout
from davae.models.base_adapters import Convolution
from davae.models.warm_blocks import folded_up_block, warm_down_block, warm_nested_up_block, warm_up_block


@torch.no_grad()
def start_blocks_from_base(model: Any) -> None:
    """Give the down block and the up block of an :class:`davae.AutoencoderDA` their start values.

    A base whose layers at the latent are not single convolutions leaves torch's random start.
    """
    base_channels, details = model.layout.base_channels, model.own_layout.detail_channels
    shift, scale = (values[:base_channels] for values in model.base_affine(model.device))
    head = model.adapter.encoder_head(model.base)
    if head is not None:
        head = head.then(torch.diag(scale), -shift * scale)
        warm_down_block(model.down, head, LatentLayout(base_channels, details))
    stem = model.adapter.network_adapter(model.base).decoder_stem(model.base_vae)
    if stem is not None:
        stem = stem.after(torch.diag(1.0 / scale), shift)
    detail_first = _detail_first(model)
    if model.below is not None:
        start = _as_seen_above(model.below, *model.base_affine(model.device))
        warm_nested_up_block(
            model.up, start, stem, model.own_layout, model.below.scale, detail_first=detail_first
        )
    elif stem is not None:
        warm_up_block(model.up, stem, model.own_layout, detail_first=detail_first)


def _as_seen_above(model: Any, shift: Tensor, scale: Tensor) -> Convolution:
    """The model's up block in front of its shuffle, for latents ``(raw - shift) * scale`` of all its channels."""
    convolution = folded_up_block(model.up, model.own_layout, detail_first=_detail_first(model))
    details = model.own_layout.detail_channels  # its own are raw in its decoder
    own_shift, own_scale = model.base_affine(shift.device)
    own_shift, own_scale = F.pad(own_shift, (0, details)), F.pad(own_scale, (0, details), value=1.0)
    return convolution.after(torch.diag(own_scale / scale), (shift - own_shift) * own_scale)


def _detail_first(model: Any) -> bool:
    return bool(model.config.decoder_channel_order == "detail_first")
