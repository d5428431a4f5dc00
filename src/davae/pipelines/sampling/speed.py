"""Options that make a pipeline or training faster and change results by rounding only."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.func import functional_call

from davae.errors import DavaeError, first_line
from davae.runtime.devices import DTYPES

logger = logging.getLogger(__name__)
_MOST_VARIANTS = 64


def speed_up(
    pipe: DiffusionPipeline,
    *,
    compile: bool = False,
    attention: str | None = None,
    channels_last: bool = True,
    decode_dtype: str | None = "auto",
    slices: bool = True,
) -> DiffusionPipeline:
    """Make a pipeline faster, in place. Images stay the same up to rounding, as docs/speed.md measures.

    Pipelines encode each text once in any case, and most run both passes of guidance as one batch.

    Args:
        pipe: base or upgraded, on the device that it will run on.
        compile: ``torch.compile`` of the transformer's repeated blocks and of the autoencoder's stages. The first image
            is slow.
        attention: backend of diffusers' attention dispatcher, such as ``"flash"`` or ``"sage"``; None changes nothing.
        channels_last: convolutions in channels-last memory order.
        decode_dtype: precision of the decoder's convolutions and matrix products: ``"bfloat16"``, ``"float16"`` or
            ``"float32"``; ``"auto"`` is bfloat16 on a CUDA device and the autoencoder's own elsewhere; None changes
            nothing.
        slices: decode one image of a batch at a time, which takes less memory.

    Returns:
        The same pipeline.

    Raises:
        DavaeError: an unknown precision, or an attention backend that :func:`set_attention` refuses.
    """
    if decode_dtype not in (None, "auto", *DTYPES):
        raise DavaeError(f"decode_dtype must be auto, {', '.join(DTYPES)} or None, not '{decode_dtype}'")
    parts = [part for name in ("transformer", "vae") if (part := getattr(pipe, name, None)) is not None]
    if attention is not None:
        set_attention(pipe.transformer, attention)
    for part in parts:
        if channels_last:
            order_channels_last(part)
        if compile:
            compile_regions(part)
    vae = pipe.vae
    if slices and hasattr(vae, "enable_slicing"):
        vae.enable_slicing()
    if decode_dtype == "auto":
        computing = pipe._execution_device  # while it is offloaded, `pipe.device` is another
        decode_dtype = "bfloat16" if computing.type == "cuda" else None
    if decode_dtype is not None:
        decode_in(vae, DTYPES[decode_dtype])
    return pipe


def set_attention(transformer: Any, backend: str) -> None:
    """Set the backend of diffusers' attention dispatcher for a transformer.

    Raises:
        DavaeError: the backend is unknown or not installed, or the transformer would not use it.
    """
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    asks = any(hasattr(processor, "_attention_backend") for processor in processors)
    if not asks and backend != "native" and backend in {one.value for one in AttentionBackendName}:
        raise DavaeError(
            f"attention '{backend}': the attention of {type(transformer).__name__} does not use diffusers' "
            "attention dispatcher, so the backend would have no effect. Leave it out"
        )
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise DavaeError(f"attention '{backend}': {first_line(error)}") from error


def order_channels_last(module: nn.Module) -> None:
    """Put the weights of two-dimensional convolutions in channels-last memory order, in place."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def decode_in(vae: Any, dtype: torch.dtype) -> None:
    """Let ``vae.decode`` compute in ``dtype`` under autocast; its input and output keep their dtypes."""
    # Bound by `partial`, and not by a closure: a deep copy of the autoencoder then decodes with its own weights.
    vae.decode = functools.update_wrapper(functools.partial(_decode_under_autocast, vae, dtype), type(vae).decode)


class _Decoding(nn.Module):
    """``decode`` as ``forward``, for :func:`functional_call`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        return type(self.vae).decode(self.vae, z, *args, **kwargs)


def _decode_under_autocast(vae: Any, dtype: torch.dtype, z: Tensor, *args: Any, **kwargs: Any) -> Any:
    if dtype == torch.float32 and z.device.type != "cuda":  # autocast to float32 has no effect there
        tensors = {**dict(vae.named_parameters()), **dict(vae.named_buffers())}
        floats = {f"vae.{name}": value.float() for name, value in tensors.items() if value.is_floating_point()}
        made = functional_call(_Decoding(vae), floats, (z.float(), *args), kwargs)
    else:
        enabled = dtype != torch.float32 or z.dtype != torch.float32
        with torch.autocast(z.device.type, dtype=dtype, enabled=enabled):
            made = type(vae).decode(vae, z, *args, **kwargs)
    if isinstance(made, tuple):
        return (made[0].to(z.dtype), *made[1:])
    made.sample = made.sample.to(z.dtype)
    return made


def compile_regions(module: nn.Module, *, one_size: bool = False) -> int:
    """Compile the repeated parts of models, in place: a transformer's blocks, an autoencoder's stages.

    All blocks of a class share one compilation, and the model's own code between them, which may branch, stays eager.

    Args:
        module: a model of diffusers or davae, or a module that contains some.
        one_size: compile for each image size separately, not with dynamic shapes.

    Returns:
        The number of parts, which are compiled when they first run.
    """
    # Adaptive loss weights run backward through one graph twice, for which donated buffers would be missing.
    torch._functorch.config.donated_buffer = False
    # Blocks of one class share their code, and torch limits how often it is compiled: once per kind of block and size.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _MOST_VARIANTS)
    found = list(regions(module))
    for region in found:
        region.compile(dynamic=False if one_size else None)
    logger.info("%s: %d parts will be compiled when they first run", type(module).__name__, len(found))
    return len(found)


def regions(module: nn.Module) -> Iterator[nn.Module]:
    """The parts that :func:`compile_regions` compiles, none inside another.

    They are the blocks that a model declares as repeated (``_repeated_blocks``); otherwise the members of its outermost
    module lists and its ``mid_block``; without any of these, the model itself.
    """
    if not isinstance(module, ModelMixin):
        for child in module.children():
            yield from regions(child)
        return
    repeated = set(getattr(module, "_repeated_blocks", None) or ())

    def walk(parent: nn.Module) -> Iterator[nn.Module]:
        for name, child in parent.named_children():
            if type(child).__name__ in repeated or (not repeated and name == "mid_block"):
                yield child
            elif isinstance(child, nn.ModuleList) and not repeated:
                yield from child
            else:
                yield from walk(child)

    yield from list(walk(module)) or [module]
