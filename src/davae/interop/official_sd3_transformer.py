"""The authors' widened SD3 transformer to a plain ``SD3Transformer2DModel`` with more channels, and back.

The authors keep the new channels in branches beside the old layers. The layers are linear, so each pair of
branches is equivalent to one wider layer:

* ``pos_embed.proj.base_conv`` and ``extra_conv``: their outputs are added, so the weights are concatenated on
  the input axis and the biases are summed;
* ``proj_out.base_linear`` and ``extra_linear``: their channels are concatenated at each of the p * p positions.

The branches do not depend on the order in which the authors' model takes its channels; only latents must be
reordered, see `from_official_order`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from torch import Tensor

from davae.choices import ChannelOrder
from davae.errors import DavaeError
from davae.interop.checking import listed
from davae.latents import LatentLayout
from davae.runtime.model_files import not_finite

_INPUT, _OUTPUT = "pos_embed.proj", "proj_out"
_BRANCHES = {_INPUT: ("base_conv", "extra_conv"), _OUTPUT: ("base_linear", "extra_linear")}
_OFFICIAL = tuple(
    f"{layer}.{branch}.{kind}"
    for layer, branches in _BRANCHES.items()
    for branch in branches
    for kind in ("weight", "bias")
)
_OURS = tuple(f"{layer}.{kind}" for layer in _BRANCHES for kind in ("weight", "bias"))


def load_transformer(
    state_dict: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[SD3Transformer2DModel, LatentLayout]:
    """The widened transformer in eval mode, and its channels, from official weights.

    Args:
        state_dict: official names.
        config: that of the pretrained transformer; its channel counts are replaced.

    Raises:
        DavaeError: see `from_official`, or other weights are missing, unexpected, of another shape or not finite.
    """
    converted, layout = from_official(state_dict)
    with init_empty_weights(include_buffers=False):
        transformer = SD3Transformer2DModel.from_config(
            dict(config), in_channels=layout.channels, out_channels=layout.channels
        )
    expected = transformer.state_dict()
    _require(converted, present=tuple(expected), absent=sorted(converted.keys() - expected.keys()))
    reshaped = [
        f"{name} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
        for name, tensor in converted.items()
        if tensor.shape != expected[name].shape
    ]
    faults = {"other shapes": reshaped, "not finite": not_finite(converted)}
    if any(faults.values()):
        raise DavaeError(f"the configuration does not fit the weights; {listed(faults)}")
    transformer.load_state_dict(converted, strict=True, assign=True)
    return transformer.eval(), layout


def from_official(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], LatentLayout]:
    """State dict of a plain, wider ``SD3Transformer2DModel`` (base first), and its channels.

    Args:
        state_dict: official names; layers other than the patch embedder and the head keep their names.

    Raises:
        DavaeError: a branch is missing, there is a plain layer as well, or shapes do not fit.
    """
    _require(state_dict, present=_OFFICIAL, absent=_OURS)
    convolutions = [state_dict[f"{_INPUT}.{branch}.weight"] for branch in _BRANCHES[_INPUT]]  # [H, C, p, p]
    layout = LatentLayout(convolutions[0].shape[1], convolutions[1].shape[1])
    patch = convolutions[0].shape[-1]
    for branch, channels in zip(_BRANCHES[_OUTPUT], (layout.base_channels, layout.detail_channels), strict=True):
        for kind in ("weight", "bias"):
            name = f"{_OUTPUT}.{branch}.{kind}"
            if len(state_dict[name]) != patch**2 * channels:
                raise DavaeError(
                    f"{name} has {len(state_dict[name])} rows, but {channels} channels in patches of {patch} "
                    f"need {patch**2 * channels}"
                )

    converted = {name: tensor for name, tensor in state_dict.items() if name not in _OFFICIAL}
    base, extra = (f"{_INPUT}.{branch}" for branch in _BRANCHES[_INPUT])
    converted[f"{_INPUT}.weight"] = torch.cat(convolutions, dim=1)
    converted[f"{_INPUT}.bias"] = state_dict[f"{base}.bias"] + state_dict[f"{extra}.bias"]
    for kind in ("weight", "bias"):
        heads = [state_dict[f"{_OUTPUT}.{branch}.{kind}"] for branch in _BRANCHES[_OUTPUT]]
        positions = [head.unflatten(0, (patch**2, -1)) for head in heads]  # [p * p, C, ...], [p * p, D, ...]
        converted[f"{_OUTPUT}.{kind}"] = torch.cat(positions, dim=1).flatten(0, 1)
    return converted, layout


def to_official(state_dict: Mapping[str, Tensor], layout: LatentLayout) -> dict[str, Tensor]:
    """The inverse of `from_official`. The base branch gets the patch embedder's bias, the other one zeros.

    Raises:
        DavaeError: the state dict is not that of an SD3 transformer with the layout's channels.
    """
    _require(state_dict, present=_OURS, absent=_OFFICIAL)
    weight = state_dict[f"{_INPUT}.weight"]  # [H, C + D, p, p]
    rows = weight.shape[-1] ** 2 * layout.channels
    if weight.shape[1] != layout.channels or len(state_dict[f"{_OUTPUT}.weight"]) != rows:
        raise DavaeError(
            f"the transformer takes {weight.shape[1]} channels and its head has "
            f"{len(state_dict[f'{_OUTPUT}.weight'])} rows; {layout.base_channels} base and "
            f"{layout.detail_channels} detail channels need {layout.channels} and {rows}"
        )
    sizes = [layout.base_channels, layout.detail_channels]
    bias = state_dict[f"{_INPUT}.bias"]
    converted = {name: tensor for name, tensor in state_dict.items() if name not in _OURS}
    for branch, part, part_bias in zip(
        _BRANCHES[_INPUT], weight.split(sizes, dim=1), (bias, torch.zeros_like(bias)), strict=True
    ):
        converted[f"{_INPUT}.{branch}.weight"] = part.contiguous()
        converted[f"{_INPUT}.{branch}.bias"] = part_bias
    for kind in ("weight", "bias"):
        positions = state_dict[f"{_OUTPUT}.{kind}"].unflatten(0, (-1, layout.channels))  # [p * p, C + D, ...]
        for branch, part in zip(_BRANCHES[_OUTPUT], positions.split(sizes, dim=1), strict=True):
            converted[f"{_OUTPUT}.{branch}.{kind}"] = part.flatten(0, 1).contiguous()
    return converted


def split_plain_layers(state_dict: Mapping[str, Tensor], base_channels: int, order: ChannelOrder) -> dict[str, Tensor]:
    """Plain wider layers as branches, whose names determine the channel order; branches are left unchanged.

    Args:
        state_dict: official names.
        base_channels: channels of the transformer before it was widened.
        order: channel order in plain layers.

    Raises:
        DavaeError: the layers are not wider than the base's, or input and output layers do not fit each other.
    """
    if f"{_INPUT}.weight" not in state_dict:
        return dict(state_dict)
    _require(state_dict, present=_OURS, absent=_OFFICIAL)
    channels = state_dict[f"{_INPUT}.weight"].shape[1]
    if channels <= base_channels:
        raise DavaeError(
            f"'{_INPUT}.weight' takes {channels} channels, the base {base_channels}: this transformer was not widened"
        )
    layout = LatentLayout(base_channels, channels - base_channels)
    if len(state_dict[f"{_OUTPUT}.weight"]) % channels:
        raise DavaeError(
            f"{_OUTPUT}.weight has {len(state_dict[f'{_OUTPUT}.weight'])} rows, not a multiple of {channels} channels"
        )
    reordered = dict(state_dict)
    reordered[f"{_INPUT}.weight"] = from_official_order(state_dict[f"{_INPUT}.weight"], layout, order)
    for kind in ("weight", "bias"):
        positions = state_dict[f"{_OUTPUT}.{kind}"].unflatten(0, (-1, channels))  # [p * p, C + D, ...]
        reordered[f"{_OUTPUT}.{kind}"] = from_official_order(positions, layout, order).flatten(0, 1)
    return to_official(reordered, layout)


def from_official_order(latent: Tensor, layout: LatentLayout, order: ChannelOrder) -> Tensor:
    """[B, C + D, ...] in the authors' channel order to base first; ``"detail_first"`` is their ``reverse=True``."""
    if order == "base_first":
        return latent
    detail, base = latent.split([layout.detail_channels, layout.base_channels], dim=1)
    return layout.join(base, detail)


def _require(state_dict: Mapping[str, Any], *, present: Sequence[str], absent: Sequence[str]) -> None:
    faults = {
        "missing": [name for name in present if name not in state_dict],
        "unexpected": [name for name in absent if name in state_dict],
    }
    if any(faults.values()):
        raise DavaeError(f"this is not the expected SD3 transformer state dict. {listed(faults)}")
