"""Peak memory of every phase of an upgrade, by part: on the device, and in main memory beside it.

A phase is what a command goes through: ``start`` (opening and encoding what is encoded once), ``step``, ``validation``
and ``export`` of each training stage, and ``images`` and ``text`` of ``davae cache``. Where there is no device, the
main memory holds all. Activations come from running the real classes on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from davae.models import AutoencoderDA
from davae.models.latent_space import decode, encode
from davae.pipelines.families import PROMPTS_TOGETHER
from davae.pipelines.sampling.speed import regions
from davae.planner.architectures import Architecture, block_runs, build_text_encoder, cost_by_depth, shallow_copy
from davae.planner.memory import Cost, built_without_weights, bytes_of, cost_of
from davae.planner.stages import AutoencoderRun, DiffusionRun, Run, StageCost, forward_cost, lora_layers
from davae.runtime.pixel_budget import images_together

PROGRAM = 650_000_000
"""Bytes that Python with torch, diffusers and transformers takes before anything is opened, libraries included."""
_CLIP_TOKENS = 77


@dataclass(frozen=True)
class Phase:
    """Bytes by part: on the device, in main memory, and of copies in main memory that only a device makes necessary.

    Such copies are checkpoints and files that are written: what is in main memory already is written from there.
    """

    device: Mapping[str, int]
    host: Mapping[str, int]
    copies: Mapping[str, int] = field(default_factory=dict)
    most_alone: int = 0
    """Of several moments: the largest without a device, which need be neither of those that the parts are of."""

    @classmethod
    def of_moments(cls, *moments: Phase) -> Phase:
        """What a phase of several moments takes: each figure is that of the moment where it is largest."""
        device = max(moments, key=lambda one: one.device_bytes)
        host = max(moments, key=lambda one: one.host_bytes)
        return cls(device.device, host.host, host.copies, max(one.together for one in moments))

    @property
    def device_bytes(self) -> int:
        """All parts on the device."""
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        """All parts in main memory, where there is a device."""
        return sum(self.host.values()) + sum(self.copies.values())

    @property
    def together(self) -> int:
        """Main memory without a device."""
        return self.most_alone or self.device_bytes + sum(self.host.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "device": dict(self.device),
            "host": {**self.host, **self.copies},
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "without_device_bytes": self.together,
        }


Phases = dict[str, dict[str, Phase]]
"""By stage (``autoencoder``, ``cache``, ``diffusion``) and phase."""


def autoencoder_phases(
    architecture: Architecture, vae: AutoencoderDA, resolution: int, run: AutoencoderRun, step: StageCost
) -> dict[str, Phase]:
    """Phases of stage 1.

    Args:
        architecture: the base.
        vae: the upgraded autoencoder in float32, not used up.
        resolution: side of the images.
        run: how it is trained.
        step: its step, from :func:`davae.planner.stages.autoencoder_stage`.
    """
    base = _bytes(architecture.build_vae())
    together, image = images_together(resolution, resolution), 12 * resolution**2
    images = torch.empty(together, 3, resolution, resolution, device="meta")
    kept = _between_steps(step)
    host, copied = {"program": PROGRAM, "base": base}, {"checkpoint": _checkpoint(step, run)}
    fit = _forward(vae, lambda: encode(vae.base_vae, images), cpu=run.cpu) if run.fitted_start else 0
    shown = 5 * image * run.validation_images  # the images and their rows

    def validate() -> None:
        below, z_d = vae.encode_prefix(images), vae.encode_own_details(images).mean
        rows = [vae.decode_base(vae.encode_base(images))] if vae.config.has_base_decoder else []
        rows += [vae.decode_structured(below, z_d)]
        del rows
        vae.decode_alone(below)

    validation = {**kept, "activations": _forward(vae, validate, cpu=run.cpu)}
    export = {**kept, "activations": _forward(vae, lambda: vae.encode_details(images), cpu=run.cpu)}
    return {
        "start": Phase({"autoencoder": step.memory["autoencoder"], "activations": fit}, host),
        "step": Phase(step.memory, {**host, "images": 2 * run.batch_size * image}, copied),
        "validation": Phase(validation, {**host, "images": shown}, copied),
        "export": Phase(export, {**host, "images": 64 * image}, {"file": _bytes(vae)}),
    }


@dataclass(frozen=True)
class Encoding:
    """Bytes of the autoencoder and of the text encoders (in 16 bit), and of the activations while each encodes."""

    autoencoder: int
    images: int
    text_encoders: int
    largest_text_encoder: int
    texts: int


def encoding_costs(architecture: Architecture, vae: AutoencoderDA, resolution: int, run: DiffusionRun) -> Encoding:
    """What encoding takes: of as many images, or prompts, as go through together."""
    together = images_together(resolution, resolution)
    images = torch.empty(together, 3, resolution, resolution, device="meta")
    weights, activations = [0], [0]
    for name, config in architecture.text_encoders.items():
        encoder = nn.Module.to(build_text_encoder(name, config), torch.bfloat16).eval()
        clip = config["model_type"] == "clip_text_model"
        length = _CLIP_TOKENS if clip else run.prompt_length or architecture.prompt_length
        ids = torch.zeros(PROMPTS_TOGETHER, length, dtype=torch.long, device="meta")
        activations.append(_forward(encoder, lambda: encoder(input_ids=ids), cpu=run.cpu))  # noqa: B023 (called at once)
        weights.append(_bytes(encoder))
    of_images = _forward(vae, lambda: vae.encode(images), cpu=run.cpu)
    return Encoding(_bytes(vae), of_images, sum(weights), max(weights), max(activations))


def cache_phases(encoding: Encoding, resolution: int) -> dict[str, Phase]:
    """Phases of ``davae cache``: captions by the base's text encoders, images by the upgraded autoencoder."""
    read = {"images": 2 * images_together(resolution, resolution) * 12 * resolution**2}
    device = {"autoencoder": encoding.autoencoder, "activations": encoding.images}
    found = {"images": Phase(device, {"program": PROGRAM, **read})}
    if encoding.text_encoders:
        device = {"text encoders": encoding.text_encoders, "activations": encoding.texts}
        found["text"] = Phase(device, {"program": PROGRAM, "autoencoder": encoding.autoencoder})
    return found


def diffusion_phases(
    architecture: Architecture,
    vae: AutoencoderDA,
    resolution: int,
    run: DiffusionRun,
    step: StageCost,
    encoding: Encoding,
    *,
    text_tokens: int,
) -> dict[str, Phase]:
    """Phases of stage 2.

    Args:
        architecture: the base.
        vae: the upgraded autoencoder in float32.
        resolution: side of the images.
        run: how it is trained.
        step: its step, from :func:`davae.planner.stages.diffusion_stage`.
        encoding: what encoding takes.
        text_tokens: of a prompt.
    """
    weights, image = encoding.autoencoder, 12 * resolution**2
    plain = architecture.build_transformer()
    widened, widening = built_without_weights(lambda: architecture.build_transformer(vae.layout.detail_channels))
    sampling = _sampling(architecture, widened, vae, resolution, run, text_tokens)
    base_sampling = _sampling(architecture, plain, vae.base_vae, resolution // vae.scale, run, text_tokens)
    base = bytes_of(plain.parameters())  # in the precision that it was sampled in
    host = {"program": PROGRAM, "base autoencoder": _bytes(architecture.build_vae())}
    resting = {"resting blocks": step.resting} if step.resting else {}
    copied = {"checkpoint": _checkpoint(step, run)}
    kept = {**_between_steps(step), "autoencoder": weights}
    opened = {"text encoder": encoding.largest_text_encoder}
    if run.quantization != "none":
        opened["the base's own weights"] = base
    export = Phase(kept, {**host, **resting, **opened}, {"file": step.memory["transformer"]})
    # Without a device the base's file stays mapped as long as a weight of it is in use.
    merged = bytes_of(layer.weight for layer in lora_layers(plain, run)) if run.mode == "lora" else 0
    between = {"autoencoder": weights} if run.cached else {}  # in main memory, off the device
    return {
        "start": Phase.of_moments(
            Phase(
                {"text encoders": encoding.text_encoders, "activations": encoding.texts},
                {"program": PROGRAM, "autoencoder": weights},
            ),
            Phase(
                {"autoencoder": weights, "activations": encoding.images},
                {"program": PROGRAM, "text encoders": encoding.text_encoders},
            ),
            Phase({}, {**host, "autoencoder": weights, "base transformer": base, "widening": widening}),
            Phase(
                {"base transformer": base - _at_rest_while_sampled(plain, run), "activations": base_sampling},
                {**host, "autoencoder": weights, "widened layers and adapters": 4 * step.trained_parameters},
                {"widened transformer": base},  # shares the base's memory, which a device holds again
            ),
        ),
        "step": Phase(step.memory, {**host, **between, **resting}, copied),
        "validation": Phase(
            {**kept, "activations": sampling},
            {**host, **resting, "images": 3 * run.validation_images * image},
            copied,
        ),
        "export": replace(export, most_alone=export.together + merged),
    }


def _at_rest_while_sampled(base: nn.Module, run: DiffusionRun) -> int:
    """Bytes of the base's blocks that rest while its samples are made: all but one, where training saves memory."""
    if run.quantization == "none" and not run.offload_blocks:
        return 0
    blocks = [_bytes(block) for block in regions(base)]
    return sum(blocks) - max(blocks)


def _between_steps(step: StageCost) -> dict[str, int]:
    """What a device holds where no step is made."""
    return {k: v for k, v in step.memory.items() if k not in ("gradients", "activations")}


def _checkpoint(step: StageCost, run: Run) -> int:
    """Bytes of what learns, copied from a device to be written: weights, moments and averages."""
    return round((4 + run.optimizer_bytes + 4 * run.ema) * step.trained_parameters)


def _sampling(
    architecture: Architecture, transformer: nn.Module, vae: Any, side: int, run: DiffusionRun, text_tokens: int
) -> int:
    """Bytes of activations while images are made: a denoising step of those made together, or decoding them.

    Args:
        architecture: gives the passes a step.
        transformer: the base's or the widened one; cast in place.
        vae: its autoencoder.
        side: of the images in pixels.
        run: how many are made, and the precision.
        text_tokens: of a prompt.
    """
    together = min(4, images_together(side, side), max(1, run.validation_images))
    mixed = run.frozen_dtype == "bfloat16"
    dtype = torch.bfloat16 if mixed else torch.float32
    narrow = nn.Module.to(transformer, dtype).eval()
    latent = encode(vae, torch.empty(together, 3, side, side, device="meta"))
    noisy = torch.empty(architecture.passes * together, *latent.shape[1:], device="meta", dtype=dtype)

    def measure(shorten: Callable[[nn.Module], nn.Module]) -> Cost:
        model: Any = shorten(shallow_copy(narrow))
        return forward_cost(model, noisy, text_tokens=text_tokens, watch=True)

    steps = cost_by_depth(measure, block_runs(narrow))
    return max(steps.peak_bytes, _forward(vae, lambda: decode(vae, latent), autocast=mixed, cpu=run.cpu))


def _forward(model: nn.Module, run: Callable[[], object], *, autocast: bool = False, cpu: bool = False) -> int:
    def without_gradients() -> None:
        with torch.no_grad():
            run()

    given = [*model.parameters(), *model.buffers()]
    return cost_of(without_gradients, given=given, autocast=autocast, cpu=cpu).peak_bytes


def _bytes(model: nn.Module) -> int:
    return bytes_of([*model.parameters(), *model.buffers()])
