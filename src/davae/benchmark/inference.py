"""How much faster the upgraded model generates an image, and how much of that its FLOPs explain."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from davae.benchmark.timing import SideBySide, side_by_side
from davae.benchmark.variants import Variant, compile_parts, make_variants
from davae.errors import DavaeError
from davae.pipelines.sampling.speed import set_attention
from davae.planner.architectures import find_architecture
from davae.runtime.devices import chosen_device, named_dtype


@dataclass(frozen=True)
class InferenceRow:
    """Cost of one image for one variant.

    Attributes:
        name: ``base``, ``native``, ``upgraded xS`` or ``decoder alone xS``.
        resolution: side of the image in pixels.
        tokens: image tokens.
        steps: denoising steps.
        text_seconds, step_seconds, decode_seconds: medians, per image; no text if the configuration has no text
            encoder or it was not requested.
        image_seconds: median of the sum of text, all steps and the decoder.
        whole_image_seconds: median of images generated end to end, if requested.
        text_flops, step_flops, decode_flops: FLOPs per image.
        achieved_flops: FLOPs per second over ``image_seconds``.
        peak_memory_bytes: peak of a step and a decode on a CUDA device, with the weights of transformer and
            autoencoder but not of the text encoders; ``None`` on other devices.
        speedup: over native, the median of the ratios of all rounds, for the sum of the parts.
        whole_image_speedup: the same for end-to-end images.
        flop_limited_speedup: native's FLOPs per image over this variant's.
    """

    name: str
    resolution: int
    tokens: int
    steps: int
    text_seconds: float | None
    step_seconds: float
    decode_seconds: float
    image_seconds: float
    whole_image_seconds: float | None
    text_flops: int
    step_flops: int
    decode_flops: int
    achieved_flops: float
    peak_memory_bytes: int | None
    speedup: float
    whole_image_speedup: float | None
    flop_limited_speedup: float

    @property
    def share(self) -> float:
        """The measured speed-up (end to end if measured) as a fraction of the FLOP-limited one."""
        measured = self.speedup if self.whole_image_speedup is None else self.whole_image_speedup
        return measured / self.flop_limited_speedup


@dataclass(frozen=True)
class InferenceBenchmark:
    """A benchmark's rows and the conditions of measurement."""

    base: str
    device: str
    dtype: str
    batch: int
    repeats: int
    compiled: bool
    attention: str
    torch: str
    rows: list[InferenceRow]

    def to_json(self) -> dict[str, Any]:
        """Plain values, each row with its ``share``."""
        return {**asdict(self), "rows": [{**asdict(row), "share": row.share} for row in self.rows]}


def bench_inference(
    base: str,
    *,
    resolution: int,
    scales: Sequence[int] = (2,),
    detail_channels: int | None = None,
    batch: int = 1,
    steps: int | None = None,
    repeats: int = 5,
    device: str | None = None,
    dtype: str = "float32",
    attention: str = "native",
    compile: bool = False,
    text: bool = True,
    end_to_end: bool = False,
) -> InferenceBenchmark:
    """Time base, native and upgraded models, and the decoder alone, with random weights, alternating in one process.

    Text encoding, a step and the decoder are timed separately, and every round times all variants once, so that drift
    of the machine affects them alike. The time of an image is the sum of its parts and, with ``end_to_end``, also
    measured.

    Args:
        base: a preset, a name on the hub, or a pipeline folder (see `find_architecture`).
        resolution: side of the full image in pixels.
        scales: of the upgraded models.
        detail_channels: ``D``; by default `default_detail_channels`.
        batch: images at a time.
        steps: denoising steps per image; by default the pipeline's.
        repeats: number of rounds; medians are reported.
        device: ``cpu`` or ``cuda``; by default the GPU if there is one.
        dtype: ``float32``, ``bfloat16`` or ``float16``, for all variants.
        attention: backend of diffusers' attention dispatcher, for all variants.
        compile: compile repeated blocks and autoencoder stages, for all variants.
        text: include the text encoders, if the configuration describes any.
        end_to_end: also time whole images: text, every step and the decoder.

    Raises:
        DavaeError: an unknown base, dtype or device, sizes that do not divide, or ``repeats`` below 1.
    """
    if repeats < 1:
        raise DavaeError(f"repeats must be at least 1, not {repeats}")
    where, precision = chosen_device(device), named_dtype(dtype)
    variants = make_variants(
        find_architecture(base),
        resolution=resolution,
        scales=scales,
        detail_channels=detail_channels,
        batch=batch,
        steps=steps,
        device=where,
        dtype=precision,
        encode_text=text,
    )
    text_flops = variants[0].text_flops()
    flops = {c.name: _Flops(text_flops, c.step_flops(), c.decode_flops()) for c in variants}
    for transformer in {id(c.transformer): c.transformer for c in variants}.values():
        if attention != "native":
            set_attention(transformer, attention)
    if compile:
        compile_parts(variants)
    encoded = None  # encoders and prompts are the same for all variants
    if variants[0].text is not None:
        encoded = side_by_side({"text": variants[0].encode_text}, repeats).times["text"]
    timed = _Times(
        encoded or [0.0] * repeats,
        side_by_side({c.name: c.step for c in variants}, repeats),
        side_by_side({c.name: c.decode for c in variants}, repeats),
        side_by_side({c.name: c.image for c in variants}, repeats, warmup=0) if end_to_end else None,
    )
    peaks = {c.name: _peak(c, where) for c in variants}
    return InferenceBenchmark(
        base=base,
        device=device_name(where),
        dtype=dtype,
        batch=batch,
        repeats=repeats,
        compiled=compile,
        attention=attention,
        torch=torch.__version__,
        rows=[_row(c, variants[1], flops, timed, peaks) for c in variants],
    )


@dataclass(frozen=True)
class _Flops:
    text: int
    step: int
    decode: int

    def image(self, steps: int) -> int:
        return self.text + steps * self.step + self.decode


@dataclass(frozen=True)
class _Times:
    """Seconds per batch, by round."""

    text: list[float]
    steps: SideBySide
    decoded: SideBySide
    images: SideBySide | None

    def added_up(self, c: Variant) -> list[float]:
        parts = zip(self.text, self.steps.times[c.name], self.decoded.times[c.name], strict=True)
        return [text + c.steps * step + decode for text, step, decode in parts]


def _row(
    variant: Variant, native: Variant, flops: dict[str, _Flops], timed: _Times, peaks: dict[str, int | None]
) -> InferenceRow:
    batch, name, whole = len(variant.latent), variant.name, timed.images
    own, natives = flops[name], flops[native.name]
    mine = timed.added_up(variant)
    image = median(mine) / batch
    ratios = [n / c for n, c in zip(timed.added_up(native), mine, strict=True)]
    return InferenceRow(
        name=name,
        resolution=variant.resolution,
        tokens=variant.tokens,
        steps=variant.steps,
        text_seconds=median(timed.text) / batch if variant.text is not None else None,
        step_seconds=timed.steps.medians[name] / batch,
        decode_seconds=timed.decoded.medians[name] / batch,
        image_seconds=image,
        whole_image_seconds=None if whole is None else whole.medians[name] / batch,
        text_flops=own.text,
        step_flops=own.step,
        decode_flops=own.decode,
        achieved_flops=own.image(variant.steps) / image,
        peak_memory_bytes=peaks[name],
        speedup=median(ratios),
        whole_image_speedup=None if whole is None else whole.speedup(name, native.name),
        flop_limited_speedup=natives.image(native.steps) / own.image(variant.steps),
    )


def _peak(variant: Variant, device: str) -> int | None:
    """Peak of what a step and a decode allocate, plus the weights of transformer and autoencoder, in bytes."""
    if not device.startswith("cuda"):
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    variant.step()
    variant.decode()
    added = torch.cuda.max_memory_allocated() - before
    weights = [*variant.transformer.parameters(), *variant.vae.parameters()]
    return added + sum(p.numel() * p.element_size() for p in weights)


def device_name(device: str) -> str:
    """The name of the GPU, or of the CPU with its number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
