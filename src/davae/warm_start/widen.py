"""Widen a pretrained transformer to the structured latent without changing its predictions.

The token embedding is linear in the latent and the head linear in the features, so zero weights for the new
channels, in and out, leave the base prediction unchanged and predict zero details, for any detail input.
"""

import logging
from copy import deepcopy
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from davae.errors import WarmStartError
from davae.latents import LatentLayout
from davae.warm_start.description import ChannelDescription
from davae.warm_start.patterns import pattern_count
from davae.warm_start.plain_state import require_no_hooks, require_plain, unwrapped
from davae.warm_start.registry import description_of
from davae.warm_start.self_check import check_warm_start

logger = logging.getLogger(__name__)

Transformer = TypeVar("Transformer", bound=ModelMixin)

# State that is neither weight nor configuration, which a rebuilt module would lack.
_RUNTIME_STATE = ("training", "gradient_checkpointing", "_gradient_checkpointing_func", "_chunk_size", "_chunk_dim")


def widen_channels(
    transformer: Transformer, *, base_channels: int, detail_channels: int, copy: bool = True
) -> Transformer:
    """A new transformer of the same class that takes and predicts ``[z, z_d]``, base first.

    Weights and biases of the new channels are zero; every other weight is copied, and dtype, device,
    ``requires_grad``, training mode, gradient checkpointing and attention processors are kept. The original is
    not changed. The result is verified before it is returned (`check_warm_start`).

    Args:
        transformer: a diffusers transformer, or a ControlNet, whose residuals stay the same; its class is described
            (see `describe`) or can be probed. If it is compiled, the model inside the wrapper is widened.
        base_channels: channels of the base latent, as the autoencoder counts them (not packed).
        detail_channels: channels to add, at least 1.
        copy: False lets unchanged weights share the memory of the original's, for an original that is not used while
            the result is trained.

    Raises:
        DavaeError: a channel count is below 1.
        WarmStartError: the class is not described and cannot be probed, its channels are not `base_channels`, its
            weights are not loaded or not plain tensors, it has adapters, hooks, caches or the like, or the result does
            not start as the original (the layer is named).
    """
    transformer = unwrapped(transformer)
    layout = LatentLayout(base_channels, detail_channels)
    if detail_channels < 1:
        raise WarmStartError(f"detail_channels must be at least 1, not {detail_channels}: nothing to widen")
    _check_widenable(transformer)
    description = description_of(transformer).fitted(transformer, base_channels)
    widened = _build(transformer, _widened_config(transformer, description, layout))
    require_no_hooks(transformer, f"this {type(transformer).__name__}", widened)
    _copy_runtime_state(transformer, widened)
    _copy_weights(transformer, widened, description, layout, copy=copy)
    logger.info("%s: %s", type(transformer).__name__, check_warm_start(transformer, widened, layout))
    return widened


def _check_widenable(transformer: ModelMixin) -> None:
    for name, parameter in transformer.named_parameters():
        if parameter.is_meta:
            raise WarmStartError(f"{name} has no values (meta device): load the transformer, then widen it")
    require_plain(transformer, f"this {type(transformer).__name__}")


def _widened_config(transformer: ModelMixin, description: ChannelDescription, layout: LatentLayout) -> dict[str, int]:
    sizes = description.resolve_sizes(transformer)
    return {
        key: pattern_count(str(pattern), sizes, layout.channels)
        for key, pattern in description.counts.items()
        if transformer.config[key] is not None  # otherwise it follows another key
    }


def _build(transformer: Transformer, changes: dict[str, int]) -> Transformer:
    # Parameters without memory, replaced by the copies, so that there are never three models in memory.
    # Some constructors draw random numbers on the CPU; the caller's random state must not change.
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        widened = type(transformer).from_config(transformer.config, **changes)
        if type(widened) is not type(transformer):  # a legacy class that `from_config` replaces by its successor
            options, _, _ = type(transformer).extract_init_dict(dict(transformer.config))
            widened = type(transformer)(**{**options, **changes})
    return widened


def _copy_runtime_state(original: ModelMixin, widened: ModelMixin) -> None:
    for name, module in original.named_modules():
        if hasattr(module, "processor"):  # before its submodules, which the processor may contain
            widened.get_submodule(name).processor = deepcopy(module.processor)
    for name, module in original.named_modules():
        twin = _twin(widened, name)
        for attribute in _RUNTIME_STATE:
            if attribute in vars(module):
                setattr(twin, attribute, vars(module)[attribute])


def _twin(widened: nn.Module, name: str) -> nn.Module:
    try:
        return widened.get_submodule(name)
    except AttributeError:
        raise WarmStartError(
            f"{name} is not part of a {type(widened).__name__} built from the configuration: remove adapters "
            "(fuse_lora and unload_lora, or merge_and_unload) and unfuse projections, then widen"
        ) from None


def _copy_weights(
    original: ModelMixin, widened: nn.Module, description: ChannelDescription, layout: LatentLayout, *, copy: bool
) -> None:
    sizes = description.resolve_sizes(original)
    places = {place.parameter: place for place in description.places}
    parameters = dict(original.named_parameters(remove_duplicate=False))
    missing = [p.parameter for p in description.places if not p.optional and p.parameter not in parameters]
    if missing:
        raise WarmStartError(f"{type(original).__name__} has no {', '.join(missing)}, described as having channels")

    tied: dict[int, nn.Parameter] = {}  # a parameter shared by two names stays shared
    for name, parameter in parameters.items():
        if id(parameter) not in tied:
            values = parameter.detach()
            if name in places:
                values = places[name].widen(values, sizes, layout)
            elif copy:
                values = values.clone()
            tied[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
        _place(widened, name, tied[id(parameter)])
    for name, buffer in original.named_buffers(remove_duplicate=False):
        _place(widened, name, buffer.clone() if copy else buffer)

    empty = [name for name, parameter in widened.named_parameters() if parameter.is_meta]
    if empty:
        raise WarmStartError(f"the original has no {', '.join(empty)}, which its configuration requires")


def _place(widened: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = _twin(widened, path)
    home: dict[str, Any] = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
    if home.get(key) is None:
        raise WarmStartError(
            f"{name} is not part of a {type(widened).__name__} built from the configuration: remove "
            "adapters, then widen"
        )
    if home[key].shape != tensor.shape:
        raise WarmStartError(
            f"{name}: the wider configuration gives shape {tuple(home[key].shape)}, the description "
            f"{tuple(tensor.shape)}: the description of the class misses this place or has it wrong"
        )
    home[key] = tensor
