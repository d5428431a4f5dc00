"""Upgrade a pipeline to one of the same class that makes larger images with a structured autoencoder."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import AutoencoderDA
from davae.pipelines.families import find_family, fit_to_autoencoder
from davae.pipelines.families.family import SHIFT_LINE
from davae.pipelines.sampling.previews import set_preview_decoder
from davae.warm_start import WarmStartError, widen_channels
from davae.warm_start.plain_state import require_no_hooks, require_plain, unwrapped
from davae.warm_start.self_check import same_values

P = TypeVar("P", bound=DiffusionPipeline)


def upgrade_pipeline(
    pipe: P,
    vae: AutoencoderDA,
    *,
    timestep_shift: TimestepShift = "base",
    preview_decoder: ModelMixin | None = None,
    copy: bool = True,
) -> P:
    """Replace the autoencoder and widen the transformer; everything else is kept and shared with ``pipe``.

    The new VAE has the device and dtype of ``pipe.vae``, the new transformer those of ``pipe.transformer``. Switch
    offloading on after the upgrade.

    The result starts as the pretrained model: its base channels follow the base pipeline up to rounding, and the
    predicted details are zero until they are tuned. ``height`` and ``width`` are in pixels of the full resolution. A
    schedule that depends on the size is by default the one that the base was trained with at the same number of
    tokens; the scheduler is a copy that has it in its configuration.

    A ``vae`` without details (:meth:`AutoencoderDA.without_details`) leaves the transformer, and what was loaded into
    it, as they are: the result shares them with ``pipe``.

    Other models that read latents are widened with the transformer: ControlNets, and a second transformer. Parts with
    offloading, caches, hooks, adapters or quantised weights are refused: switch these on for the result instead.
    Compilation, tiling, slicing and a replaced ``vae.decode`` are not carried over either, and a warning names them.

    Args:
        pipe: a text-to-image, image-to-image or inpainting pipeline with a ``vae`` and a 2D ``transformer``; it is
            not changed.
        vae: made from ``pipe.vae`` by :meth:`AutoencoderDA.from_base`; may add several levels. ``pipe`` may itself be
            an upgraded pipeline, whose autoencoder is then the lower levels of ``vae``. It is not changed: it becomes
            part of the result if it has the device and dtype of ``pipe.vae``, otherwise a copy does. For a VAE that
            is more precise than the rest of the pipeline, call ``result.vae.to(torch.float32)`` afterwards.
        timestep_shift: ``"base"``, ``"native"`` (the schedule that the base model would use for the full
            resolution) or a number above 0 (a fixed shift); see :func:`scheduler_for`.
        preview_decoder: a small decoder of the base's latents (such as TAESD) for
            :class:`davae.pipelines.sampling.previews.Previews`; it is not part of the saved pipeline.
        copy: False lets the result share the memory of unchanged weights with ``pipe``, so that a large transformer is
            in memory once; training the result then also changes ``pipe``.

    Returns:
        A new pipeline of the same class.

    Raises:
        DavaeError: the pipeline has no transformer or VAE, its weights or those of ``vae`` are offloaded, ``vae`` was
            made from another base, the timestep shift does not suit the pipeline, or the preview decoder has another
            number of channels.
        WarmStartError: the transformer's channels are not the autoencoder's, the widened transformer does not
            start as the original (the layer is named), a part has state that cannot be carried over, or a model that
            reads latents cannot be widened (it is named).
    """
    for part in ("vae", "transformer"):
        if not isinstance(getattr(pipe, part, None), nn.Module):
            raise DavaeError(f"{type(pipe).__name__} has no {part}: davae upgrades pipelines that have both")
    vae = unwrapped(vae)
    if not isinstance(vae, AutoencoderDA):
        raise DavaeError(f"upgrade_pipeline takes an AutoencoderDA, not {type(vae).__name__}")
    _check_not_offloaded(pipe, vae)
    base_vae = unwrapped(pipe.vae)
    require_plain(base_vae, "the pipeline's VAE")
    require_no_hooks(base_vae, "the pipeline's VAE")
    require_plain(vae, "the autoencoder")
    layout = layout_over(base_vae, vae)
    scheduler = scheduler_for(
        pipe,
        timestep_shift,
        scale=vae.scale // getattr(base_vae, "scale", 1),
        channels=(layout.base_channels, layout.channels),
    )
    widened = _widened_parts(pipe, layout, copy=copy) if layout.detail_channels else {}
    replaced = {"vae": _placed_as(base_vae, vae), **widened, "scheduler": scheduler}
    arguments = {**_constructor_arguments(pipe), **replaced}
    upgraded = fit_to_autoencoder(type(pipe)(**arguments))
    if "id2label" in arguments and "id2label" not in upgraded.config:  # otherwise it would not be saved
        upgraded.register_to_config(id2label=arguments["id2label"])
    if hasattr(pipe, "_progress_bar_config"):
        upgraded.set_progress_bar_config(**pipe._progress_bar_config)
    if preview_decoder is not None:
        set_preview_decoder(upgraded, preview_decoder)
    _tell_what_is_off({name: pipe.components[name] for name in ("vae", *widened)})
    return upgraded


def _widened_parts(pipe: DiffusionPipeline, layout: LatentLayout, *, copy: bool) -> dict[str, nn.Module]:
    """The transformer and the other models that read latents, widened, by their names in the pipeline."""
    channels: dict[str, Any] = {
        "base_channels": layout.base_channels,
        "detail_channels": layout.detail_channels,
        "copy": copy,
    }
    transformer = unwrapped(pipe.transformer)
    widened: dict[str, nn.Module] = {"transformer": widen_channels(transformer, **channels)}
    for name, part in pipe.components.items():
        model = unwrapped(part)
        if name in ("vae", "transformer") or not isinstance(model, ModelMixin) or not _reads_latents(model):
            continue
        try:
            if model is transformer:
                widened[name] = widened["transformer"]
            elif isinstance(nets := getattr(model, "nets", None), nn.ModuleList):  # several ControlNets
                require_no_hooks(model, f"the {name}")
                widened[name] = type(model)([widen_channels(net, **channels) for net in nets]).train(model.training)
            else:
                widened[name] = widen_channels(model, **channels)
        except WarmStartError as error:
            raise WarmStartError(
                f"the {name} of this {type(pipe).__name__}, a {type(model).__name__}, reads latents as the transformer "
                f"does, but cannot be upgraded with it: {error}"
            ) from error
    return widened


def _reads_latents(model: ModelMixin) -> bool:
    """Judged by class and configuration: a ControlNet, or a model with a key for its number of input channels."""
    if "ControlNet" in type(model).__name__:
        return True
    return any(key.endswith(("in_channels", "in_dim")) for key in model.config)


def _tell_what_is_off(parts: dict[str, Any]) -> None:
    """Warn of what was switched on for the base's replaced parts and can be switched on for the result again."""
    off = []
    for name, part in parts.items():
        model = unwrapped(part)
        if model is not part or any(getattr(m, "_compiled_call_impl", None) is not None for m in model.modules()):
            off.append(f"the {name} was compiled")
    vae = unwrapped(parts["vae"])
    off += [f"the VAE's {switch} was on" for switch in ("tiling", "slicing") if getattr(vae, f"use_{switch}", False)]
    if "decode" in vars(vae):
        off.append("the VAE's decode was replaced (as speed_up does)")
    if off:
        logger.warning("%s; for the upgraded pipeline switch it on again", ", ".join(off))


def _check_not_offloaded(pipe: DiffusionPipeline, vae: AutoencoderDA) -> None:
    """Refuse offloading: its hooks belong to the weights of one model, and the new models would not have them."""
    parts = (*(part for part in pipe.components.values() if isinstance(part, ModelMixin)), vae)
    if (
        getattr(pipe, "_all_hooks", None)  # enable_model_cpu_offload
        or any(parameter.is_meta for part in parts for parameter in part.parameters())
        or any(pipe._maybe_raise_error_if_group_offload_active(module=part) for part in parts)
    ):
        raise DavaeError(
            "offloading is switched on for the pipeline or the autoencoder: upgrade the pipeline first, then switch "
            "offloading on for the result"
        )


def _placed_as(base: ModelMixin, vae: AutoencoderDA) -> AutoencoderDA:
    """The autoencoder on the device and in the precision of the base VAE: itself, or a copy if they differ."""
    own = {(p.device, p.dtype) for p in vae.parameters()}
    if own == {(base.device, base.dtype)}:
        return vae
    placed = deepcopy(vae)
    nn.Module.to(placed, device=base.device, dtype=base.dtype)  # diffusers' own warns of float32 modules
    return placed


def _constructor_arguments(pipe: DiffusionPipeline) -> dict[str, object]:
    """The arguments that the pipeline was built with: its components, and settings from its configuration."""
    arguments = {}
    for name in inspect.signature(type(pipe).__init__).parameters:
        if name in pipe.components:
            arguments[name] = pipe.components[name]
        elif name in pipe.config:
            arguments[name] = pipe.config[name]
        elif name == "id2label" and getattr(pipe, "labels", None):  # DiT keeps only the inverse mapping
            arguments[name] = _names_by_number(pipe.labels)
    return arguments


def _names_by_number(labels: dict[str, int]) -> dict[str, str]:
    """Names by class number (as text); several names of one number are joined by commas."""
    names: dict[str, list[str]] = {}
    for name, number in labels.items():
        names.setdefault(str(number), []).append(name)
    return {number: ", ".join(found) for number, found in names.items()}


@torch.no_grad()
def layout_over(base: nn.Module, vae: AutoencoderDA) -> LatentLayout:
    """The channels of a pipeline with the VAE ``base`` (as base channels), and those that ``vae`` adds (as detail).

    ``base`` is the pretrained VAE or, for a pipeline that was upgraded before, a lower level of ``vae``, whose whole
    latent ``[z, z_d1]`` then counts as base.

    Raises:
        DavaeError: ``vae`` was made from another base (the first difference is named), or adds no level to it.
    """
    if isinstance(base, AutoencoderDA):
        number, levels = base.levels[-1].number, vae.levels
        if number >= levels[-1].number:
            raise DavaeError(
                f"this pipeline has been upgraded before, to scale {base.scale} with {base.layout.channels} "
                "channels: upgrade its base pipeline instead, or add a level to its autoencoder with "
                "AutoencoderDA.from_base(pipe.vae, ...)"
            )
        ours: Any = vae.at_level(number)
        known = ours.layout.channels
    else:
        ours, known = vae.base_vae, vae.layout.base_channels
    if type(ours) is not type(base):
        raise DavaeError(
            f"the autoencoder was made from a {type(ours).__name__}, the pipeline has a {type(base).__name__}"
        )
    _check_same_weights(ours, base, whole=vae.config.has_base_decoder)
    if isinstance(base, AutoencoderDA):
        _check_same_statistics(ours, base)
    return LatentLayout(known, vae.layout.channels - known)


def _check_same_statistics(ours: Any, theirs: Any) -> None:
    for name, mine, other in zip(("mean", "std"), ours.detail_statistics(), theirs.detail_statistics()):
        if not torch.allclose(mine, other.to(mine.device)):
            raise DavaeError(
                f"the autoencoder was made from another base: the {name} of its lower levels' details is not "
                "that of the pipeline's VAE, with which its transformer was tuned"
            )


def _check_same_weights(ours: nn.Module, theirs: nn.Module, *, whole: bool) -> None:
    """Require that the frozen part equals the pipeline's VAE; unless ``whole``, without its decoder."""
    mine, other = ours.state_dict(), theirs.state_dict()
    if not whole:
        other = {name: value for name, value in other.items() if name in mine}
    if mine.keys() != other.keys():
        raise DavaeError(
            f"the autoencoder's base has other layers than the pipeline's VAE: {min(mine.keys() ^ other.keys())}"
        )
    for name, value in other.items():
        if mine[name].shape != value.shape:
            raise DavaeError(
                f"the autoencoder was made from another base VAE: '{name}' has shape {tuple(mine[name].shape)}, "
                f"the pipeline's {tuple(value.shape)}"
            )
        if not _equal(mine[name], value):
            raise DavaeError(
                f"the autoencoder was made from another base VAE: '{name}' differs from the pipeline's. "
                "Train the autoencoder with AutoencoderDA.from_base(pipe.vae, ...)"
            )


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether the values are equal in the narrower of the two dtypes."""
    narrow = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
    return same_values(ours.to(narrow), theirs.to(device=ours.device, dtype=narrow))


logger = logging.getLogger(__name__)

TimestepShift = Literal["base", "native"] | float


def scheduler_for(
    pipe: DiffusionPipeline, shift: TimestepShift, *, scale: int, channels: tuple[int, int]
) -> SchedulerMixin:
    """A copy of the pipeline's scheduler with the timestep shift of the upgraded pipeline.

    Args:
        pipe: the base pipeline; its scheduler is not changed.
        shift: ``"base"``: the schedule that the base was trained with at the same number of tokens.
            ``"native"``: the one that the base would use for the full resolution, which is ``s^2`` times the tokens
            (token counts in the configuration are divided by ``s^2``). A number above 0: that shift for every size.
        scale: ``s``.
        channels: of the base latent and of the upgraded one.

    Raises:
        DavaeError: the choice is unknown, or this pipeline does not take its shift from the scheduler.
    """
    config = pipe.scheduler.config
    changes: dict[str, Any] = {}
    if isinstance(shift, bool) or not (shift in ("base", "native") or isinstance(shift, int | float)):
        raise DavaeError(f"timestep_shift must be 'base', 'native' or a number, not {shift!r}")
    if isinstance(shift, int | float):
        changes = _fixed(pipe, float(shift))
    elif config.get("use_dynamic_shifting"):
        changes = _line(pipe, shift, scale, channels)
    scheduler = type(pipe.scheduler).from_config(config, **changes)
    logger.info("timestep shift '%s': %s", shift, _summary(scheduler, shift))
    return scheduler


def _line(pipe: DiffusionPipeline, shift: str | float, scale: int, channels: tuple[int, int]) -> dict[str, Any]:
    family = find_family(pipe)
    if family.shift_rule is not None:
        if shift == "base" and not family.shift_reads_pixels:
            return {}
        raise DavaeError(
            f"timestep_shift '{shift}' cannot be written into the scheduler: {type(pipe).__name__} "
            f"{family.shift_rule}. Give a number"
        )
    line = {key: pipe.scheduler.config.get(key, value) for key, value in SHIFT_LINE.items()}
    factor = family.shift_line_factor(native=shift == "native", scale=scale, channels=channels)
    for key in ("base_image_seq_len", "max_image_seq_len"):
        stretched = line[key] * factor
        line[key] = int(stretched) if stretched == int(stretched) else stretched
    return line


def _fixed(pipe: DiffusionPipeline, shift: float) -> dict[str, Any]:
    if not (math.isfinite(shift) and shift > 0):
        raise DavaeError(f"a timestep shift must be a positive number, not {shift}")
    config = pipe.scheduler.config
    key = next((key for key in ("flow_shift", "shift") if key in config), None)
    flow = key == "shift" or config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    if key is None or not flow:
        raise DavaeError(
            f"{type(pipe.scheduler).__name__} has no timestep shift (it is not a flow-matching scheduler here): "
            "leave timestep_shift at 'base'"
        )
    changes: dict[str, Any] = {key: shift}
    if config.get("use_dynamic_shifting"):  # otherwise the pipeline's own `mu` would apply
        changes["use_dynamic_shifting"] = False
    return changes


def _shift_key(config: Mapping[str, Any]) -> str | None:
    """The configuration key of a fixed shift; None unless it is a flow-matching scheduler."""
    if "shift" in config:
        return "shift"
    flow = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return "flow_shift" if "flow_shift" in config and flow else None


def _summary(scheduler: SchedulerMixin, shift: TimestepShift) -> str:
    config = scheduler.config
    if config.get("use_dynamic_shifting"):
        written = ", ".join(f"{key} {config[key]}" for key in SHIFT_LINE if key in config)
        return f"follows the number of tokens: {written}"
    key = _shift_key(config)
    if key is None:
        return "this scheduler has none"
    why = " (the same for every size, so nothing changes)" if isinstance(shift, str) else ""
    return f"{key} {config[key]}{why}"
