"""Speed and memory of the upgraded autoencoder and of the base VAE at the same resolution."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.benchmark.inference import device_name
from davae.benchmark.timing import peak_tensor_bytes, side_by_side
from davae.benchmark.variants import Variant, make_variants
from davae.errors import DavaeError
from davae.evaluation.metrics.names import DECODER_ALONE
from davae.models import find_adapter
from davae.planner.architectures import find_architecture
from davae.runtime.devices import chosen_device, named_dtype


@dataclass(frozen=True)
class AutoencoderRow:
    """Measurements of one autoencoder.

    Attributes:
        name: ``base``, ``upgraded`` or ``decoder alone``; ``, tiled`` is appended for tiled ones.
        encode_images_per_second, decode_images_per_second: from median times.
        decode_over_base: decoding time relative to the base's (tiled to tiled), median of the ratios of all rounds.
        decode_memory_bytes: peak memory of tensors allocated during a decode, without weights.
    """

    name: str
    encode_images_per_second: float
    decode_images_per_second: float
    decode_over_base: float
    decode_memory_bytes: int


@dataclass(frozen=True)
class AutoencoderBenchmark:
    """A benchmark's rows and the conditions of measurement."""

    base: str
    resolution: int
    scale: int
    device: str
    dtype: str
    batch: int
    repeats: int
    compiled: bool
    torch: str
    rows: list[AutoencoderRow]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def bench_autoencoder(
    base: str,
    *,
    resolution: int,
    scale: int = 2,
    detail_channels: int | None = None,
    batch: int = 1,
    repeats: int = 5,
    tile: int | None = None,
    device: str | None = None,
    dtype: str = "float32",
    compile: bool = False,
) -> AutoencoderBenchmark:
    """Time encoding and decoding by the base VAE, by the upgraded one and by its joint decoder alone, alternating, with
    random weights.

    Args:
        base: a preset, a name on the hub, or a pipeline folder.
        resolution: side of the images in pixels.
        scale: of the upgrade.
        detail_channels: ``D``; by default `default_detail_channels`.
        batch: images at a time.
        repeats: number of rounds; medians are reported.
        tile: measure all also with tiles of this side in pixels.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        dtype: of all.
        compile: compile encoders and decoders of all, except tiled ones.

    Raises:
        DavaeError: an unknown base, dtype or device, or sizes that do not divide.
    """
    where, precision = chosen_device(device), named_dtype(dtype)
    _, native, upgraded, alone = make_variants(
        find_architecture(base),
        resolution=resolution,
        scales=(scale,),
        detail_channels=detail_channels,
        batch=batch,
        device=where,
        dtype=precision,
        encode_text=False,
    )
    unit = upgraded.vae.spatial_compression
    if tile is not None and (tile % unit or tile < 2 * unit):
        raise DavaeError(
            f"tile must be a multiple of {unit} pixels (one latent position), at least {2 * unit}, not {tile}"
        )
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, resolution, resolution, generator=generator).to(native.latent) * 2 - 1
    images = images.contiguous(memory_format=torch.channels_last)
    encoders: dict[str, Callable[[], None]] = {}
    decoders: dict[str, Callable[[], None]] = {}
    for name, variant in (("base", native), ("upgraded", upgraded), (DECODER_ALONE, alone)):
        for tiled in (False, True) if tile else (False,):
            key = f"{name}, tiled" if tiled else name
            side = tile if tiled else None
            encoders[key] = _encode(variant.vae, images, side, compile)
            decoders[key] = _decode(variant, side, compile)
    encoded, decoded = side_by_side(encoders, repeats), side_by_side(decoders, repeats)
    rows = []
    for key in encoders:
        reference = "base, tiled" if key.endswith("tiled") else "base"
        rows.append(
            AutoencoderRow(
                name=key,
                encode_images_per_second=batch / encoded.medians[key],
                decode_images_per_second=batch / decoded.medians[key],
                decode_over_base=decoded.speedup(reference, key),
                decode_memory_bytes=peak_tensor_bytes(decoders[key], where),
            )
        )
    return AutoencoderBenchmark(
        base=base,
        resolution=resolution,
        scale=scale,
        device=device_name(where),
        dtype=dtype,
        batch=batch,
        repeats=repeats,
        compiled=compile,
        torch=torch.__version__,
        rows=rows,
    )


def _tiling(vae: ModelMixin, tile: int | None) -> None:
    if tile is None:
        vae.disable_tiling()
        return
    taken = inspect.signature(vae.enable_tiling).parameters
    if "tile_sample_min_size" in taken:
        vae.enable_tiling(tile_sample_min_size=tile)
    elif "tile_sample_min_height" in taken:
        unit = vae.spatial_compression_ratio
        step = tile * 3 // 4 // unit * unit  # tiles overlap by about a quarter
        vae.enable_tiling(tile, tile, step, step)
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size = tile
        if hasattr(vae, "tile_latent_min_size"):  # AutoencoderKL has the latent's tile as a separate attribute
            vae.tile_latent_min_size = tile // 2 ** (len(vae.config.block_out_channels) - 1)


def _encode(vae: ModelMixin, images: Tensor, tile: int | None, compiled: bool) -> Callable[[], None]:
    encode = partial(find_adapter(type(vae).__name__)[1].encode, vae)
    call = torch.compile(encode) if compiled and tile is None else encode

    @torch.inference_mode()
    def run() -> None:
        _tiling(vae, tile)
        call(images)

    return run


def _decode(variant: Variant, tile: int | None, compiled: bool) -> Callable[[], None]:
    vae = variant.vae
    call = torch.compile(variant.decoder) if compiled and tile is None else variant.decoder

    @torch.inference_mode()
    def run() -> None:
        _tiling(vae, tile)
        call()

    return run
