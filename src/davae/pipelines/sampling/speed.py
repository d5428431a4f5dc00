"""What makes a pipeline or a training faster without changing its results by more than rounding."""

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
    """Make a pipeline faster, in place. Images stay the same up to rounding; how far, see docs/speed.md.

    Text is encoded once an image and both passes of guidance go through the transformer in one batch in any case: the
    pipelines do that by themselves.

    Args:
        pipe: base or upgraded, where it is to run.
        compile: ``torch.compile`` of the transformer's repeated blocks and of the autoencoder's stages. The first image
            is slow.
        attention: backend of diffusers' attention dispatcher, such as ``"flash"`` or ``"sage"``; none leaves torch's.
        channels_last: convolutions in channels-last memory order.
        decode_dtype: in which precision convolutions and products of the decoder are computed: ``"bfloat16"``,
            ``"float16"``, ``"float32"``; ``"auto"`` is bfloat16 on a GPU and the autoencoder's own elsewhere, and none
            leaves it alone.
        slices: decode one image of a batch at a time, which takes less memory.

    Returns:
        The same pipeline.

    Raises:
        DavaeError: an unknown precision, or an attention backend that is not known or not installed.
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
        computing = pipe._execution_device  # its own device says nothing while it is offloaded
        decode_dtype = "bfloat16" if computing.type == "cuda" else None
    if decode_dtype is not None:
        decode_in(vae, DTYPES[decode_dtype])
    return pipe


def set_attention(transformer: Any, backend: str) -> None:
    """Choose the backend of diffusers' attention dispatcher.

    Raises:
        DavaeError: no such backend, what it needs is not installed, or the transformer would not use it.
    """
    processors = [getattr(module, "processor", None) for module in transformer.modules()]
    asks = any(hasattr(processor, "_attention_backend") for processor in processors)
    if not asks and backend != "native" and backend in {one.value for one in AttentionBackendName}:
        raise DavaeError(
            f"attention '{backend}': the attention of {type(transformer).__name__} does not ask diffusers for a "
            "backend, and would stay as it is. Leave it out"
        )
    try:
        transformer.set_attention_backend(backend)
    except (ValueError, RuntimeError, ImportError) as error:
        raise DavaeError(f"attention '{backend}': {first_line(error)}") from error


def order_channels_last(module: nn.Module) -> None:
    """Weights of two-dimensional convolutions in channels-last memory order; others have none."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def decode_in(vae: Any, dtype: torch.dtype) -> None:
    """Let ``vae.decode`` compute in another precision under autocast; what goes in and comes out keeps its own."""
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
    if dtype == torch.float32 and z.device.type != "cuda":  # autocast does nothing for float32 there
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
    """Compile what models are made of again and again, in place: a transformer's blocks, an autoencoder's stages.

    Compiling a block once serves all of its kind and leaves the model's own code, which may branch, as it is.

    Args:
        module: a model of diffusers or davae, or a module that holds some.
        one_size: compile again for each size of images rather than once for all of them.

    Returns:
        How many parts were compiled.
    """
    # Adaptive weights go back through one graph twice, which buffers that a backward gives away would not survive.
    torch._functorch.config.donated_buffer = False
    # Blocks of one class share their code, and torch counts how often it is compiled: kinds of blocks times sizes.
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, _MOST_VARIANTS)
    found = list(regions(module))
    for region in found:
        region.compile(dynamic=False if one_size else None)
    logger.info("%s: %d parts are compiled when they first run", type(module).__name__, len(found))
    return len(found)


def regions(module: nn.Module) -> Iterator[nn.Module]:
    """The parts that :func:`compile_regions` compiles, none inside another.

    They are the blocks that a model names as repeated; else the members of its outermost lists of modules and an
    autoencoder's middle; else the model itself.
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
