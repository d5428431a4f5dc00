"""Accounts for every tensor: those missing, unknown or of another shape are named before anything is loaded."""

import logging
from collections.abc import Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from davae.errors import DavaeError, first_names
from davae.latents.statistics import check_channel_statistics
from davae.runtime.model_files import not_finite

logger = logging.getLogger(__name__)
ModelT = TypeVar("ModelT", bound=nn.Module)
_SHOWN = 20  # most names of a kind in a message; a model of another size differs in hundreds


def listed(faults: Mapping[str, Sequence[str]]) -> str:
    """Names by kind of fault in one line, at most the first ``_SHOWN`` of each."""
    return "; ".join(f"{kind}: {first_names(names, _SHOWN)}" for kind, names in faults.items() if names)


def require(weights: Mapping[str, Tensor], names: Sequence[str], what: str) -> None:
    """Check that the tensors from which a configuration is read are present.

    Args:
        weights: by name.
        names: the tensors needed.
        what: what the weights should be, for the message.

    Raises:
        DavaeError: names the missing ones.
    """
    absent = [name for name in names if name not in weights]
    if absent:
        raise DavaeError(f"this is not {what} as published. missing: {', '.join(absent)}")


def check_keys(
    converted: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, unknown: Sequence[str] = ()
) -> None:
    """Check that the converted tensors are exactly the model's, by name and shape, and finite.

    Args:
        converted: under davae's names.
        expected: the model's state dict; may be on the meta device.
        what: what the weights should be, for the message.
        unknown: official names without a translation.

    Raises:
        DavaeError: lists what is missing, unexpected, of another shape or not finite.
    """
    faults = {
        "missing": sorted(expected.keys() - converted.keys()),
        "unexpected": [*unknown, *sorted(converted.keys() - expected.keys())],
        "of another shape": [
            f"{name} {tuple(converted[name].shape)}, expected {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & converted.keys())
            if converted[name].shape != expected[name].shape
        ],
        "not finite": not_finite(converted),
    }
    if any(faults.values()):
        ours = " (missing ones by their names in the diffusers model)" if faults["missing"] else ""
        raise DavaeError(f"this is not {what} as published. {listed(faults)}{ours}")


def filled(model: ModelT, converted: Mapping[str, Tensor], what: str) -> ModelT:
    """The model with these weights, in eval mode; raises as :func:`check_keys`."""
    check_keys(converted, model.state_dict(), what)
    model.load_state_dict(dict(converted))
    return model.eval()


def channel_statistics(
    given: tuple[Sequence[float], Sequence[float]], channels: int, what: str = "the latent"
) -> tuple[list[float], list[float]]:
    """The given means and standard deviations as lists of floats, checked.

    Raises:
        DavaeError: not one per channel of ``what``, or a value that is not finite, or a deviation not above 0.
    """
    mean, std = (list(map(float, values)) for values in given)
    if len(mean) != channels or len(std) != channels:
        raise DavaeError(f"there are {len(mean)} means and {len(std)} deviations, but {what} has {channels} channels")
    check_channel_statistics("mean", mean, "std", std, channels)
    return mean, std


def set_aside(state_dict: Mapping[str, Tensor], reasons: Mapping[str, str]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights that are used, and the names of those known to be unused, which are logged with the reason.

    Args:
        state_dict: by name.
        reasons: prefixes of names -> why they are unused.
    """
    unused = {name for name in state_dict if name.startswith(tuple(reasons))}
    for start, reason in reasons.items():
        count = sum(name.startswith(start) for name in unused)
        if count:
            logger.info("not used: %s* (%d tensors), %s", start, count, reason)
    kept = {name: tensor for name, tensor in state_dict.items() if name not in unused}
    return kept, [name for name in state_dict if name in unused]
