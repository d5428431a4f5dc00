"""Which weights learn, and in which precision."""

import difflib
import re

import torch
from diffusers.models.modeling_utils import ModelMixin
from peft import LoraConfig
from torch import Tensor

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.pipelines.families import PipelineFamily
from davae.pipelines.lora import attach_lora
from davae.recipes.settings import DiffusionSettings, LoraSettings, TuneSettings
from davae.warm_start import channel_parameters, new_channel_masks


def select_trained(
    transformer: ModelMixin, family: PipelineFamily, layout: LatentLayout, settings: DiffusionSettings
) -> dict[str, float]:
    """Freeze and free parameters as ``tune.mode`` says.

    The widened input and output layers learn in every mode: LoRA cannot hold them.

    Args:
        transformer: a widened transformer; changed in place (adapters, ``requires_grad``, frozen dtype).
        family: names the usual targets of adapters.
        layout: base and detail channels.
        settings: mode, adapters and precision.

    Returns:
        Learning rates of the widened layers by parameter name, where they have their own.

    Raises:
        DavaeError: no detail channels, or a LoRA target that no layer of the transformer answers to.
    """
    mode, tune = settings.tune.mode, settings.tune
    if mode != "full" and not layout.detail_channels:
        raise DavaeError(f"tune.mode={mode} needs detail channels; a base model is trained in full")
    widened = channel_parameters(transformer)
    if tune.new_channels_start == "random":
        _start_at_random(transformer, layout, settings.loop.seed)
    transformer.requires_grad_(mode == "full")
    if mode == "lora":
        attach_lora(transformer, lora_config(transformer, family, tune.lora))
    named = dict(transformer.named_parameters())
    for name in widened:
        named[name].requires_grad_(True)
    _cast(transformer, getattr(torch, tune.frozen_dtype))
    rate = tune.new_channels_learning_rate
    return {} if rate is None else dict.fromkeys(widened, rate)


def learning_masks(transformer: ModelMixin, layout: LatentLayout, tune: TuneSettings) -> dict[str, Tensor]:
    """Where the widened layers learn, by parameter name, boolean; empty where all of them does.

    A gradient of zero leaves the base's entries exactly as they are.
    """
    return new_channel_masks(transformer, layout) if tune.mode == "new_channels" else {}


@torch.no_grad()
def _start_at_random(transformer: ModelMixin, layout: LatentLayout, seed: int) -> None:
    """Give the new channels weights with the spread of the base's: what the warm start does not do."""
    generator = torch.Generator().manual_seed(seed)
    named = dict(transformer.named_parameters())
    for name, mask in new_channel_masks(transformer, layout).items():
        weight, mask = named[name], mask.to(named[name].device)
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        weight[mask] = noise[mask] * weight[~mask].std()


def lora_config(transformer: ModelMixin, family: PipelineFamily, settings: LoraSettings) -> LoraConfig:
    """The adapters' configuration; layers with latent channels are left out, whatever the targets say.

    Raises:
        DavaeError: a target that no linear layer or convolution answers to; names the nearest.
    """
    targets = settings.targets or list(family.lora_targets)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [name for name, module in transformer.named_modules() if isinstance(module, kinds)]
    for target in targets:
        if not any(_answers(name, target) for name in layers):
            suffixes = sorted({_suffix(name) for name in layers})
            near = difflib.get_close_matches(target, suffixes, n=3, cutoff=0.3)
            raise DavaeError(
                f"tune.lora.targets: no layer of {type(transformer).__name__} is named '{target}'; "
                f"the nearest are {', '.join(near or suffixes[:5])}"
            )
    widened = sorted({name.rpartition(".")[0] for name in channel_parameters(transformer)})
    hit = [name for name in widened if any(_answers(name, target) for target in targets)]
    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        init_lora_weights="gaussian",
        target_modules=targets,
        exclude_modules="|".join(map(re.escape, hit)) or None,
    )


def _answers(name: str, target: str) -> bool:
    """Whether a layer is meant by a target, as peft understands targets."""
    return name == target or name.endswith(f".{target}")


def _cast(transformer: ModelMixin, frozen: torch.dtype) -> None:
    """Weights that learn in float32, the others in the frozen dtype; modules that insist on float32 keep it."""
    keep = tuple(getattr(transformer, "_keep_in_fp32_modules", None) or ())
    for name, parameter in transformer.named_parameters():
        insists = any(part in keep for part in name.split("."))
        wanted = torch.float32 if parameter.requires_grad or insists else frozen
        if parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


def _suffix(name: str) -> str:
    """The part of a layer's name after the last number of a block."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])
