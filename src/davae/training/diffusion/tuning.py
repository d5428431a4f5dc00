"""Which weights are trained, and in which precision."""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from davae.choices import Quantization, TuneMode
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.pipelines.families import PipelineFamily
from davae.pipelines.lora import attach_lora, attached_lora, is_target, merge_lora, remove_lora
from davae.pipelines.quantization import quantize
from davae.pipelines.saving.adapters import load_adapters
from davae.pipelines.saving.opening import LAYERS_FILE, opening, pipeline_place
from davae.recipes.settings import DiffusionSettings, LoraSettings
from davae.runtime.model_files import open_model
from davae.warm_start import channel_parameters, new_channel_masks

P = TypeVar("P", bound=DiffusionPipeline)


def started_from(start: str, pipeline: P, base: P, mode: TuneMode) -> P:
    """The upgraded pipeline with the weights of an earlier tuning.

    With ``mode`` ``full`` these are all weights of the earlier pipeline, its LoRA merged. Otherwise the base's weights
    are kept, and the earlier adapters are loaded as adapters.

    Args:
        start: ``diffusion.start_from``: the folder of a pipeline or of adapters, or a run that has them.
        pipeline: the freshly upgraded pipeline.
        base: its base.
        mode: of the tuning to start.

    Raises:
        DavaeError: there is no such folder, or its weights belong to another transformer, autoencoder or mode.
    """
    folder = Path(start)
    adapters = next((f for f in (folder, folder / "adapters") if (f / LAYERS_FILE).is_file()), None)
    if mode != "full":
        if adapters is None:
            raise DavaeError(
                f"there are no adapters in {start}, with which alone tune.mode={mode} can begin, "
                "since the base's weights stay; set diffusion.tune.mode=full to begin with its pipeline"
            )
        found = load_adapters(base, pipeline.vae, adapters)
        if mode != "lora" and attached_lora(found.transformer) is not None:
            raise DavaeError(
                f"the adapters in {start} hold a LoRA, which tune.mode={mode} has no place for: "
                "set diffusion.tune.mode=lora"
            )
        return found
    if adapters == folder:
        found = load_adapters(base, pipeline.vae, adapters)
        merge_lora(found.transformer)
        return found
    place = pipeline_place(start)
    own = pipeline.transformer
    with opening("pipeline", place):
        earlier, _ = open_model(type(own).from_pretrained, place, subfolder="transformer", dtype=torch.float32)
    ours, theirs = own.state_dict(), earlier.state_dict()
    odd = [n for n in [*ours, *theirs] if n not in ours or n not in theirs or ours[n].shape != theirs[n].shape]
    if odd:
        raise DavaeError(
            f"the transformer in {start} is not the one that is tuned here: {len(set(odd))} "
            f"tensors differ, such as '{odd[0]}'; the base and the autoencoder's channels must be the same"
        )
    own.load_state_dict(theirs, assign=True)  # not into the weights that it shares with the base
    return pipeline


def select_trained(
    transformer: ModelMixin,
    family: PipelineFamily,
    layout: LatentLayout,
    settings: DiffusionSettings,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Set which parameters are trained, as ``tune.mode`` says, and how the others are stored.

    The widened input and output layers are trained in every mode; LoRA cannot represent their new channels. The
    family's idle layers are trained in none.

    Args:
        transformer: a widened transformer; changed in place (adapters, ``requires_grad``, frozen dtype, layers).
        family: gives the default targets of adapters.
        layout: base and detail channels.
        settings: mode, adapters and precision.
        device: where layers are put that ``tune.quantization`` replaces; None leaves all layers as they are.

    Returns:
        Learning rates of the widened layers' new channels by parameter name; empty unless
        ``new_channels_learning_rate`` is set.

    Raises:
        DavaeError: the mode needs detail channels and there are none, no layer matches a LoRA target, or layers cannot
            be quantised.
    """
    mode, tune = settings.tune.mode, settings.tune
    if mode != "full" and not layout.detail_channels:
        raise DavaeError(f"tune.mode={mode} needs detail channels; a base model is trained in full")
    widened = channel_parameters(transformer)
    if tune.new_channels_start == "random":
        _start_at_random(transformer, layout, settings.loop.seed)
    transformer.requires_grad_(mode == "full")
    if tune.quantization != "none" and device is not None:
        _quantize(transformer, tune.quantization, device)
    if mode == "lora":
        _attach(transformer, family, tune.lora)
    idle = family.idle_layers(transformer)
    named = dict(transformer.named_parameters())
    for name, parameter in named.items():
        if _is_inside(name, idle):
            parameter.requires_grad_(False)
    for name in widened:
        named[name].requires_grad_(True)
    _cast(transformer, getattr(torch, tune.frozen_dtype))
    rate = tune.new_channels_learning_rate
    return {} if rate is None else dict.fromkeys(widened, rate)


def _quantize(transformer: ModelMixin, quantization: Quantization, device: torch.device) -> None:
    """Quantise a transformer; a LoRA is taken off and attached again, since peft's layers depend on what they adapt."""
    attached = attached_lora(transformer)
    weights = {}
    if attached is not None:
        weights = get_peft_model_state_dict(transformer, adapter_name=attached[0])
        remove_lora(transformer)
    quantize(transformer, quantization, device)
    if attached is not None:
        attach_lora(transformer, attached[1], attached[0])
        set_peft_model_state_dict(transformer, weights, adapter_name=attached[0])


def _attach(transformer: ModelMixin, family: PipelineFamily, settings: LoraSettings) -> None:
    """Attach a LoRA, or continue with the one already attached.

    Raises:
        DavaeError: the attached one has another rank, alpha or targets.
    """
    attached = attached_lora(transformer)
    if attached is None:
        attach_lora(transformer, lora_config(transformer, family, settings))
        return
    there, targets = attached[1], settings.targets or family.lora_targets
    found = there.target_modules if isinstance(there.target_modules, str) else sorted(there.target_modules or ())
    pairs = {
        "rank": (there.r, settings.rank),
        "alpha": (there.lora_alpha, settings.alpha),
        "targets": (found, sorted(targets)),
    }
    for name, (was, now) in pairs.items():
        if was != now:
            shown, said = (f"[{','.join(v)}]" if isinstance(v, list) else f"{v:g}" for v in (was, now))
            raise DavaeError(
                f"diffusion.start_from: the LoRA there has {name} {shown}, and the recipe says {said}: set "
                f"diffusion.tune.lora.{name}={shown}"
            )
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)


@torch.no_grad()
def _start_at_random(transformer: ModelMixin, layout: LatentLayout, seed: int) -> None:
    """Draw the new channels' weights with the standard deviation of the base's, in place of the warm start."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(transformer.named_parameters())
    for name, mask in new_channel_masks(transformer, layout).items():
        weight, mask = named[name], mask.to(named[name].device)
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        weight[mask] = noise[mask] * weight[~mask].std()


def lora_config(transformer: ModelMixin, family: PipelineFamily, settings: LoraSettings) -> LoraConfig:
    """The adapters' configuration; the widened and the idle layers are excluded even if targets match them.

    Raises:
        DavaeError: no linear layer or convolution matches a target, of which the message names the nearest, or only
            idle ones do.
    """
    targets = settings.targets or list(family.lora_targets)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    every = [name for name, module in transformer.named_modules() if isinstance(module, kinds)]
    idle = [name for name in every if _is_inside(name, family.idle_layers(transformer))]
    layers = [name for name in every if name not in idle]
    for target in targets:
        if any(is_target(name, target) for name in layers):
            continue
        if any(is_target(name, target) for name in idle):
            raise DavaeError(
                f"diffusion.tune.lora.targets: nothing uses the output of '{target}' in this model, "
                "so it cannot learn: leave it out"
            )
        suffixes = sorted({_suffix(name) for name in layers})
        near = difflib.get_close_matches(target, suffixes, n=3, cutoff=0.3)
        raise DavaeError(
            f"diffusion.tune.lora.targets: no layer of {type(transformer).__name__} is named '{target}'; "
            f"the nearest are {', '.join(near or suffixes[:5])}"
        )
    widened = sorted({name.rpartition(".")[0] for name in channel_parameters(transformer)})
    hit = [name for name in [*widened, *idle] if any(is_target(name, target) for target in targets)]
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        init_lora_weights="gaussian",
        target_modules=targets,
        exclude_modules="|".join(map(re.escape, hit)) or None,
    )


def _is_inside(name: str, layers: Sequence[str]) -> bool:
    """Whether a parameter or layer belongs to one of the layers."""
    return any(f"{name}.".startswith(f"{layer}.") for layer in layers)


def _cast(transformer: ModelMixin, frozen: torch.dtype) -> None:
    """Cast trained weights to float32 and the others to ``frozen``, except modules that must stay in float32."""
    keep = tuple(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        insists = any(part in keep for part in name.split("."))
        wanted = torch.float32 if parameter.requires_grad or insists else frozen
        if parameter.dtype != wanted and parameter.is_floating_point():  # others are quantised
            parameter.data = parameter.data.to(wanted)


def _suffix(name: str) -> str:
    """The part of a layer's name after the last block number."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])
