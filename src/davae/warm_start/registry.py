"""The described transformer classes; others are probed."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.errors import WarmStartError
from davae.warm_start.description import ChannelDescription, DummyInputs
from davae.warm_start.dummy_inputs import TEXT_TOKENS, DummyBuilder, dummy
from davae.warm_start.probing.probe import probed_description

#: A description, or a function of the transformer if the places depend on its configuration.
Describer = ChannelDescription | Callable[[ModelMixin], ChannelDescription]

_DESCRIPTIONS: dict[str, Describer] = {}


def describe(class_name: str, description: Describer) -> None:
    """Register the description of a transformer class, which also applies to its subclasses.

    Raises:
        WarmStartError: the class already has another description.
    """
    if _DESCRIPTIONS.setdefault(class_name, description) is not description:
        raise WarmStartError(f"{class_name} is already described; a class can have only one description")


def described(*class_names: str, **description: Any) -> Callable[[DummyBuilder], DummyInputs]:
    """Decorator of a function that builds dummy inputs: describes the classes with it and ``description``."""

    def with_inputs(build: DummyBuilder) -> DummyInputs:
        inputs = dummy(build)
        for name in class_names:
            describe(name, ChannelDescription(dummy_inputs=inputs, **description))
        return inputs

    return with_inputs


def description_of(transformer: ModelMixin) -> ChannelDescription:
    """The description of the transformer's class or its nearest described ancestor; otherwise a probed one.

    Raises:
        WarmStartError: it is not described and probing fails; gives the reason, and how to describe it.
    """
    for cls in type(transformer).__mro__:
        if cls.__name__ in _DESCRIPTIONS:
            found = _DESCRIPTIONS[cls.__name__]
            return found if isinstance(found, ChannelDescription) else found(transformer)
    name = type(transformer).__name__
    try:
        if not isinstance(transformer, ModelMixin):
            raise WarmStartError("it is not a diffusers model that can be rebuilt from its configuration")
        return probed_description(transformer)
    except WarmStartError as error:
        raise WarmStartError(
            f"{name} is not described, and probing did not find where its latent channels are: {error}. "
            f"Describe it with davae.warm_start.describe('{name}', ChannelDescription("
            "inputs=input_layer('...'), outputs=output_layer('...', 'p p c'), dummy_inputs=...)); the "
            "self-check then verifies the description"
        ) from error


def dummy_arguments(
    transformer: ModelMixin, latent: Tensor, generator: torch.Generator, *, text_tokens: int = TEXT_TOKENS
) -> dict[str, Any]:
    """Keyword arguments that a transformer's ``forward`` takes for a latent, with random conditioning.

    Image positions follow the latent's size. Works on any device, the meta device included.

    Args:
        transformer: a model whose class is described or can be probed.
        latent: [B, C, h, w] in the autoencoder's channels; packed here if the class takes it packed.
        generator: on the CPU; the same seed gives the same conditioning.
        text_tokens: tokens of each prompt.

    Raises:
        WarmStartError: the class is not described and cannot be probed.
    """
    # Passed only if another length is wanted, because not every `DummyInputs` takes it.
    options = {} if text_tokens == TEXT_TOKENS else {"text_tokens": text_tokens}
    return description_of(transformer).dummy_inputs(transformer, latent, generator, **options)
