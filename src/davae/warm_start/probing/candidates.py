"""Find the parameters that grow with a configuration's channel counts by building the class with other counts."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from davae.errors import WarmStartError

#: Configuration keys that count latent channels.
_CHANNEL_KEY = re.compile(r"^(cond_)?(in|out)_channels$|^latent_channels$|^(in|out)_(visual_)?dim$")
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Candidate:
    """A layer whose input or output features are latent channels.

    Attributes:
        layer: dotted name.
        axis: the axis of its weight that follows the channels.
        features: size of that axis.
        takes: true for an input layer, false for an output layer.
    """

    layer: str
    axis: int
    features: int
    takes: bool


def channel_counts(transformer: ModelMixin) -> dict[str, int | None]:
    """Configuration keys that count channels, with their values.

    Raises:
        WarmStartError: no such key has a number.
    """
    counts = {
        key: value
        for key, value in transformer.config.items()
        if _CHANNEL_KEY.match(key) and (value is None or isinstance(value, int))
    }
    if not any(value for value in counts.values()):
        raise WarmStartError("its configuration has no key such as in_channels that counts latent channels")
    return counts


def find_candidates(transformer: ModelMixin, counts: Mapping[str, int | None]) -> list[Candidate]:
    """Layers whose weights grow with the configuration's channel counts.

    Raises:
        WarmStartError: a parameter that grows cannot be widened (it is named), or no input or output layer grows.
    """
    grown = {key: 2 * value for key, value in counts.items() if value}
    before, after = _skeleton(transformer, {}), _skeleton(transformer, grown)
    shapes = {name: parameter.shape for name, parameter in after.named_parameters()}
    found: dict[str, Candidate] = {}
    for name, parameter in before.named_parameters():
        if name not in shapes:
            raise WarmStartError(f"{name} exists with one number of channels but not with another")
        changed = [i for i, (a, b) in enumerate(zip(parameter.shape, shapes[name], strict=True)) if a != b]
        layer, _, kind = name.rpartition(".")
        if changed and not (kind == "bias" and layer in found and not found[layer].takes):
            found[layer] = _candidate(before, name, changed, shapes[name])
    inputs = [c for c in found.values() if c.takes]
    if not inputs or len(inputs) == len(found):
        side = "takes" if not inputs else "gives"
        raise WarmStartError(f"no layer that {side} latent channels follows {', '.join(grown)}")
    return list(found.values())


def _skeleton(transformer: ModelMixin, changes: Mapping[str, int]) -> ModelMixin:
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        return type(transformer).from_config(transformer.config, **changes)


def _candidate(model: nn.Module, name: str, changed: list[int], after: torch.Size) -> Candidate:
    layer, _, kind = name.rpartition(".")
    module = model.get_submodule(layer)
    message = f"layer {layer or name} ({type(module).__name__}): {name} grows with the channels"
    plain = isinstance(module, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))
    if not plain or kind != "weight":
        raise WarmStartError(
            f"{message}, but only linear layers and convolutions can be widened without mixing base and detail "
            "channels (a normalisation over latent channels, for example, mixes them)"
        )
    if len(changed) != 1 or changed[0] > 1:
        raise WarmStartError(f"{message} on axes {changed}: base and detail channels would mix in it")
    if isinstance(module, _CONVOLUTIONS) and tuple(module.kernel_size) != tuple(module.stride):
        raise WarmStartError(
            f"{message}, but it is a convolution of kernel {module.kernel_size} and stride {module.stride}, "
            "which does not divide the latent into tokens"
        )
    before = model.get_parameter(name).shape[changed[0]]
    if after[changed[0]] != 2 * before:
        raise WarmStartError(
            f"{message} from {before} to {after[changed[0]]} when the count doubles: it also takes features that are "
            "not latent channels"
        )
    takes = changed[0] == (0 if isinstance(module, _TRANSPOSED) else 1)
    return Candidate(layer, changed[0], before, takes)
