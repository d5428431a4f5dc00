"""The plan of an upgrade, without training: tokens, operations, memory, speed-up and hours."""

import dataclasses
import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from davae.choices import Scale, check_choice
from davae.errors import DavaeError
from davae.models import find_adapter
from davae.pipelines.families import why_untrainable
from davae.planner.architectures import Architecture, block_runs, cost_by_depth, find_architecture, shallow_copy
from davae.planner.memory import Cost, bytes_of, cost_of
from davae.planner.phases import Phases, autoencoder_phases, cache_phases, diffusion_phases, encoding_costs
from davae.planner.stages import (
    AutoencoderRun,
    DiffusionRun,
    StageCost,
    autoencoder_stage,
    diffusion_stage,
    forward_cost,
)

VARIANTS = ("base", "native", "decoder alone", "upgraded")
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class Plan:
    """What an upgrade is expected to cost. Operations count a multiply-add as two; nothing here was timed.

    Variants are ``base`` (the base model at its own resolution, ``resolution / scale``), ``native`` (the base
    model asked for the full resolution), ``decoder alone`` (the base model at its own resolution, decoded by the
    joint decoder without details: stage 1 alone) and ``upgraded`` (the full resolution from the base's tokens).
    Stages are ``autoencoder`` and ``diffusion``.

    Attributes:
        base: name of the base.
        pipeline: class name.
        untrainable: why stage 2 cannot train the pipeline; None if it can.
        license: of the base, in words, if known.
        source: where the architecture comes from.
        resolution: side of the full-resolution image.
        scale: ``s``.
        base_channels, detail_channels: ``C`` and ``D``; several levels of details are added up.
        compression: pixels per side of a latent position, by variant.
        tokens: image tokens, by variant.
        text_tokens: tokens of a prompt.
        steps: denoising steps of an image.
        passes: transformer passes per step (2 with guidance).
        parameters: of the transformer, the widened one, the autoencoder and the text encoders.
        flops_per_step: of the transformer, all passes of a step, one image, by variant.
        flops_per_image: of the transformer, all steps, by variant.
        decode_flops: of the decoder for one image, by variant; not part of ``flops_per_image``.
        text_flops: of the text encoders for one image; not part of ``flops_per_image``.
        speedup: native over every variant, transformer operations alone.
        speedup_with_decoding: the same with text encoding and decoding.
        batch: images at a time in ``memory_bytes["inference"]``.
        memory_bytes: ``inference`` (upgraded, weights in bfloat16), ``inference_native`` and each stage.
        memory_parts: the same, by part.
        trained_parameters: by stage.
        training_flops: of the whole training, by stage.
        training_hours: on one GPU, by stage.
        gpu: its name.
        gpu_memory_bytes: its memory.
        utilisation: share of the GPU's peak that the hours assume, by stage.
        runs: the settings of each stage.
        phases: memory of every phase of training and caching, see :mod:`davae.planner.phases`.
    """

    base: str
    pipeline: str
    untrainable: str | None
    license: str | None
    source: str
    resolution: int
    scale: int
    base_channels: int
    detail_channels: int
    compression: dict[str, int]
    tokens: dict[str, int]
    text_tokens: int
    steps: int
    passes: int
    parameters: dict[str, int]
    flops_per_step: dict[str, float]
    flops_per_image: dict[str, float]
    decode_flops: dict[str, float]
    text_flops: float
    speedup: dict[str, float]
    speedup_with_decoding: dict[str, float]
    batch: int
    memory_bytes: dict[str, int]
    memory_parts: dict[str, dict[str, int]]
    trained_parameters: dict[str, int]
    training_flops: dict[str, float]
    training_hours: dict[str, float]
    gpu: str
    gpu_memory_bytes: int
    utilisation: dict[str, float]
    runs: dict[str, dict[str, Any]]
    phases: Phases

    def to_json(self) -> dict[str, Any]:
        """Plain values, as ``davae plan --json`` writes them."""
        phases = {stage: {name: one.to_json() for name, one in found.items()} for stage, found in self.phases.items()}
        return dataclasses.asdict(dataclasses.replace(self, phases={})) | {"phases": phases}


def plan(
    base: str | Path | DiffusionPipeline | Architecture,
    *,
    resolution: int,
    scale: int = 2,
    detail_channels: int | tuple[int, ...] | None = None,
    gpu: str = "H100",
    batch: int = 1,
    text_tokens: int | None = None,
    autoencoder: AutoencoderRun | None = None,
    diffusion: DiffusionRun | None = None,
) -> Plan:
    """Plan an upgrade without weights, from the real architectures on the meta device.

    Args:
        base: a bundled configuration, a pipeline or its folder, or a name on the hub (its configuration files
            are fetched); see :func:`davae.planner.architectures.find_architecture`.
        resolution: side of the full-resolution image in pixels.
        scale: full resolution over base resolution, 2, 4 or 8.
        detail_channels: ``D``, one number per level; by default :func:`default_detail_channels`.
        gpu: a name in the table of :mod:`davae.planner.plan`.
        batch: images at a time when sampling.
        text_tokens: tokens of a prompt; by default the pipeline's default length.
        autoencoder, diffusion: how the stages are trained; by default :class:`AutoencoderRun` with 20,000 steps
            of 8 images, and LoRA of rank 256 for 20,000 steps of 96 images.

    Raises:
        DavaeError: an unknown base or GPU, or sizes that do not fit.
    """
    architecture = base if isinstance(base, Architecture) else find_architecture(base)
    architecture.require_transformer()
    device = find_gpu(gpu)
    if batch < 1:
        raise DavaeError(f"batch must be at least 1, not {batch}")
    channels, compression = architecture.base_channels, architecture.base_compression
    details = default_detail_channels(channels, scale) if detail_channels is None else detail_channels
    _check_sizes(architecture, resolution, scale, compression)
    vae = architecture.build_autoencoder(scale, details)
    text = architecture.text_tokens if text_tokens is None else text_tokens

    sides = {v: resolution // scale if v == "base" else resolution for v in VARIANTS}
    f = {v: compression if v in ("base", "native") else scale * compression for v in VARIANTS}
    cost, decode = _inference(architecture, vae, sides, f, text, batch)
    tokens = {v: (sides[v] // (f[v] * architecture.patch)) ** 2 for v in VARIANTS}
    steps, passes = architecture.denoising_steps, architecture.passes
    # `cost` ran one step of `batch` images.
    per_step = {v: cost[v].flops / batch for v in VARIANTS}
    per_image = {v: per_step[v] * steps for v in VARIANTS}
    decode_flops = {v: decode[v].flops / batch for v in VARIANTS}
    encoders = architecture.text_encoder_sizes()
    clip = architecture.text_tokens - architecture.prompt_length if encoders else 0  # of the tokens counted above
    padded = max(text - clip, 0)
    lengths = [_CLIP_TOKENS if e.kind == "clip_text_model" else padded for e in encoders]
    text_flops = float(sum(2 * e.multiplied * n for e, n in zip(encoders, lengths)))
    whole = {v: per_image[v] + decode_flops[v] + passes * text_flops for v in VARIANTS}

    ae_run = autoencoder or AutoencoderRun(steps=20_000, batch_size=8)
    diff_run = diffusion or DiffusionRun(steps=20_000, batch_size=6, gradient_accumulation=16)
    encoding = _encoding_flops(vae, resolution) + text_flops
    stages, stage_flops = _stages(
        architecture, scale, details, resolution, ae_run, diff_run, text_tokens=text, encoding_flops=encoding
    )
    phases = _phases(architecture, vae, resolution, ae_run, diff_run, stages, text)
    utilisation = {"autoencoder": AUTOENCODER_UTILISATION, "diffusion": TRANSFORMER_UTILISATION}
    transformer, widened = (
        architecture.build_transformer(),
        architecture.build_transformer(vae.layout.detail_channels),
    )
    encoder_count = sum(e.parameters for e in encoders)
    memory_parts = {
        "inference": _inference_parts(widened, vae, encoder_count, cost["upgraded"], decode["upgraded"]),
        "inference_native": _inference_parts(
            transformer, architecture.build_vae(), encoder_count, cost["native"], decode["native"]
        ),
        **{name: stage.memory for name, stage in stages.items()},
    }
    why = why_untrainable(architecture.pipeline, architecture.transformer)
    return Plan(
        base=architecture.name,
        pipeline=architecture.pipeline,
        untrainable=None if why is None else str(why),
        license=None if architecture.license is None else str(architecture.license),
        source=architecture.source,
        resolution=resolution,
        scale=scale,
        base_channels=channels,
        detail_channels=vae.layout.detail_channels,
        compression=f,
        tokens=tokens,
        text_tokens=text,
        steps=steps,
        passes=passes,
        parameters={
            "transformer": _count(transformer),
            "widened transformer": _count(widened),
            "base autoencoder": _count(architecture.build_vae()),
            "autoencoder": _count(vae),
            "text encoders": encoder_count,
        },
        flops_per_step=per_step,
        flops_per_image=per_image,
        decode_flops=decode_flops,
        text_flops=text_flops,
        speedup={v: per_image["native"] / per_image[v] for v in VARIANTS},
        speedup_with_decoding={v: whole["native"] / whole[v] for v in VARIANTS},
        batch=batch,
        memory_bytes={name: sum(parts.values()) for name, parts in memory_parts.items()},
        memory_parts=memory_parts,
        trained_parameters={name: stage.trained_parameters for name, stage in stages.items()},
        training_flops=stage_flops,
        training_hours={n: hours(v, device, utilisation[n]) for n, v in stage_flops.items()},
        gpu=device.name,
        gpu_memory_bytes=device.memory_bytes,
        utilisation=utilisation,
        runs={"autoencoder": dataclasses.asdict(ae_run), "diffusion": dataclasses.asdict(diff_run)},
        phases=phases,
    )


def default_detail_channels(base_channels: int, scale: int) -> int:
    """The official code's ``C (s - 1)``, raised to a multiple of ``C`` and of ``s^2 / 2``, as the blocks need."""
    unit = math.lcm(base_channels, scale**2 // 2)
    return math.ceil(base_channels * (scale - 1) / unit) * unit


def _check_sizes(architecture: Architecture, resolution: int, scale: int, compression: int) -> None:
    unit = scale * compression * architecture.patch
    check_choice(scale, Scale, "scale")
    if resolution < 1 or resolution % unit:
        raise DavaeError(
            f"resolution {resolution} does not fit: it must be a multiple of {unit} (scale {scale} times "
            f"compression {compression} times patch {architecture.patch} of {architecture.name})"
        )


def _inference(
    architecture: Architecture,
    vae: Any,
    sides: dict[str, int],
    compression: dict[str, int],
    text_tokens: int,
    batch: int,
) -> tuple[dict[str, Cost], dict[str, Cost]]:
    """One denoising step of `batch` images and one decoding, by variant, in bfloat16."""
    base = nn.Module.to(architecture.build_transformer(), torch.bfloat16)
    widened = nn.Module.to(architecture.build_transformer(vae.layout.detail_channels), torch.bfloat16)
    base_vae = nn.Module.to(architecture.build_vae().eval(), torch.bfloat16)
    _, adapter = find_adapter(type(base_vae).__name__)
    vae = nn.Module.to(vae.eval(), torch.bfloat16)
    steps, decodes = {}, {}
    for variant in ("base", "native", "upgraded"):
        upgraded, watch = variant == "upgraded", variant != "base"
        channels = vae.layout.channels if upgraded else vae.layout.base_channels
        side = sides[variant] // compression[variant]
        options: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}
        noisy = torch.empty(architecture.passes * batch, channels, side, side, **options)
        steps[variant] = _step(widened if upgraded else base, noisy, text_tokens, watch=watch)
        latent = torch.empty(batch, channels, side, side, **options)
        decodes[variant] = _decoding(vae if upgraded else base_vae, adapter, latent, upgraded, watch=watch)
    steps["decoder alone"], decodes["decoder alone"] = steps["base"], decodes["upgraded"]
    nn.Module.to(vae, torch.float32)
    return steps, decodes


def _step(transformer: Any, noisy: Tensor, text_tokens: int, *, watch: bool) -> Cost:
    def measure(shorten: Callable[[nn.Module], nn.Module]) -> Cost:
        model: Any = shorten(shallow_copy(transformer.eval()))
        return forward_cost(model, noisy, text_tokens=text_tokens, watch=watch)

    return cost_by_depth(measure, block_runs(transformer))


def _decoding(vae: Any, adapter: Any, latent: Tensor, upgraded: bool, *, watch: bool) -> Cost:
    def decode() -> None:
        with torch.no_grad():
            vae.decode(latent) if upgraded else adapter.decode(vae, latent)

    return cost_of(decode, given=[*vae.parameters(), *vae.buffers()], watch=watch)


def _encoding_flops(vae: Any, resolution: int) -> float:
    images = torch.empty(1, 3, resolution, resolution, device="meta")

    def encode() -> None:
        with torch.no_grad():
            vae.encode(images)

    return float(cost_of(encode, watch=False).flops)


def _stages(
    architecture: Architecture,
    scale: int,
    details: int | tuple[int, ...],
    resolution: int,
    autoencoder: AutoencoderRun,
    diffusion: DiffusionRun,
    *,
    text_tokens: int,
    encoding_flops: float,
) -> tuple[dict[str, StageCost], dict[str, float]]:
    """Cost of each stage, and the operations of its whole training."""
    levels = (details,) if isinstance(details, int) else details
    factor = round(scale ** (1 / len(levels)))
    flops = 0.0
    for count in range(1, len(levels) + 1):  # several levels are trained one after another, the largest last
        s = factor**count
        vae = architecture.build_autoencoder(s, levels[:count])
        stage = autoencoder_stage(architecture, vae, resolution * s // scale, autoencoder)
        flops += stage.flops_per_image * autoencoder.images
    second = diffusion_stage(
        architecture,
        architecture.build_autoencoder(scale, levels),
        resolution,
        diffusion,
        text_tokens=text_tokens
        if diffusion.prompt_length is None
        else architecture.text_tokens_at(diffusion.prompt_length),
        encoding_flops=encoding_flops,
    )
    return (
        {"autoencoder": stage, "diffusion": second},
        {"autoencoder": flops, "diffusion": second.flops_per_image * diffusion.images},
    )


def _phases(
    architecture: Architecture,
    vae: Any,
    resolution: int,
    autoencoder: AutoencoderRun,
    diffusion: DiffusionRun,
    stages: dict[str, StageCost],
    text_tokens: int,
) -> Phases:
    length = diffusion.prompt_length
    tokens = text_tokens if length is None else architecture.text_tokens_at(length)
    encoded = encoding_costs(architecture, vae, resolution, diffusion)
    return {
        "autoencoder": autoencoder_phases(architecture, vae, resolution, autoencoder, stages["autoencoder"]),
        "cache": cache_phases(encoded, resolution),
        "diffusion": diffusion_phases(
            architecture, vae, resolution, diffusion, stages["diffusion"], encoded, text_tokens=tokens
        ),
    }


def _inference_parts(
    transformer: nn.Module, vae: nn.Module, encoder_parameters: int, step: Cost, decode: Cost
) -> dict[str, int]:
    def bf16(module: nn.Module) -> int:
        tensors = [*module.parameters(), *module.buffers()]
        return bytes_of(tensors) * 2 // max(tensors[0].element_size(), 1)

    return {
        "transformer": bf16(transformer),
        "autoencoder": bf16(vae),
        "text encoders": 2 * encoder_parameters,
        "activations": max(step.peak_bytes, decode.peak_bytes),  # denoising, then decoding
    }


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


#: Shares of a GPU's peak that training reaches with PyTorch's own kernels. Transformers: the paper's 0.25
#: images/s of SD3.5-medium at 1024 pixels on an A100 are 45 to 55 % of its peak (28 to 30 steps, guidance); a
#: backward with checkpointing is slightly less efficient. Convolutions at full resolution are bound by memory more.
TRANSFORMER_UTILISATION = 0.4
AUTOENCODER_UTILISATION = 0.25


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: short name.
        peak_flops: bfloat16 operations per second with float32 accumulation, dense (without sparsity).
        memory_bytes: of the device.
        source: of the numbers.
    """

    name: str
    peak_flops: float
    memory_bytes: int
    source: str


def _gpu(name: str, teraflops: float, gigabytes: int, source: str) -> Gpu:
    return Gpu(name, teraflops * 1e12, gigabytes * 10**9, source)


#: Datasheets' figures with sparsity are halved.
GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200", 2250, 180, "NVIDIA DGX B200 datasheet: 36 PFLOPS for eight, sparse"),
        _gpu("H200", 989, 141, "NVIDIA H200 datasheet, SXM: 1,979 TFLOPS sparse"),
        _gpu("H100", 989, 80, "NVIDIA H100 datasheet, SXM: 1,979 TFLOPS sparse"),
        _gpu("H100-PCIe", 756, 80, "NVIDIA H100 datasheet, PCIe: 1,513 TFLOPS sparse"),
        _gpu("A100", 312, 80, "NVIDIA A100 datasheet, 80 GB"),
        _gpu("A100-40GB", 312, 40, "NVIDIA A100 datasheet, 40 GB"),
        _gpu("L40S", 362, 48, "NVIDIA L40S datasheet: 733 TFLOPS sparse"),
        _gpu("5090", 209.5, 32, "NVIDIA RTX Blackwell whitepaper, GeForce RTX 5090"),
        _gpu("4090", 165.2, 24, "NVIDIA Ada whitepaper, GeForce RTX 4090"),
        _gpu("3090", 71, 24, "NVIDIA Ampere GA102 whitepaper, GeForce RTX 3090"),
        _gpu("MI300X", 1307, 192, "AMD Instinct MI300X datasheet"),
    )
}


def find_gpu(name: str) -> Gpu:
    """A GPU by name, in any case.

    Raises:
        DavaeError: an unknown name; the message lists the known ones.
    """
    known = {key.lower(): gpu for key, gpu in GPUS.items()}
    wanted = name.lower().removeprefix("rtx").strip(" -")
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, 1)
    hint = f" (did you mean {known[near[0]].name}?)" if near else ""
    raise DavaeError(f"no GPU '{name}' in the table{hint}; there are {', '.join(GPUS)}")


def hours(flops: float, gpu: Gpu, utilisation: float) -> float:
    """Hours of that many operations on one GPU at a share `utilisation` of its peak.

    Raises:
        DavaeError: a share outside (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise DavaeError(f"utilisation must lie in (0, 1], not {utilisation}")
    return flops / (gpu.peak_flops * utilisation) / 3600
