"""A tuned pipeline as a few megabytes: the LoRA, and the widened layers that a LoRA file cannot hold.

``pytorch_lora_weights.safetensors`` is the usual file of diffusers and others. ``davae_adapter.safetensors`` beside it
holds the transformer's input and output layers in full, and samples of the weights that were not trained, with which
:func:`load_adapters` recognises the base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from huggingface_hub import snapshot_download
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.models import AutoencoderDA
from davae.pipelines.families import find_family
from davae.pipelines.lora import acting_lora, attach_lora
from davae.pipelines.saving.opening import LAYERS_FILE, hub_name, load_autoencoder, opening
from davae.pipelines.upgrade import upgrade_pipeline
from davae.runtime.model_files import not_finite
from davae.runtime.places import claim
from davae.runtime.text_files import plain_json
from davae.runtime.weight_files import atomic_tensors
from davae.warm_start import description_of
from davae.warm_start.plain_state import unwrapped
from davae.warm_start.self_check import same_values

LORA_FILE = "pytorch_lora_weights.safetensors"
FORMAT = 1
SAMPLES = 8  # values of every parameter, evenly spread
_ROUNDING = 1 / 128  # relative: two roundings to bfloat16
P = TypeVar("P", bound=DiffusionPipeline)


@dataclass(frozen=True)
class _Header:
    """The metadata of ``davae_adapter.safetensors``: JSON under the key ``davae``."""

    format: int
    pipeline: str  # class names
    transformer: str
    base_channels: int
    detail_channels: int
    scale: int
    layers: list[str]  # the widened parameters, all of them tensors of the file under "transformer."
    adapter: str | None  # name of the LoRA; None if only the widened layers were trained
    scheduler: dict[str, Any]  # its configuration, timestep shift included


def save_adapters(pipe: DiffusionPipeline, folder: str | Path) -> Path:
    """Write what tuning has changed in an upgraded pipeline: LoRA and widened layers, not the base or the VAE.

    Pipelines with diffusers' LoRA methods write the LoRA file themselves; for others (PixArt, DiT) it is written in the
    same layout. Its header holds rank, alpha and targets, and what else differs from the defaults of peft, so that
    other versions of peft can read it. Alpha includes the weight given by ``set_adapters``: the loaded LoRA has the
    same effect as the saved one.

    Args:
        pipe: an upgraded pipeline whose transformer has one LoRA attached and not fused, or none if only the widened
            layers were trained.
        folder: new, empty, or one of adapters, which are replaced atomically; its other files are kept. Save the
            autoencoder separately, with ``pipe.vae.save_pretrained``, for example in ``folder/autoencoder``.

    Returns:
        The folder.

    Raises:
        DavaeError: the pipeline is not upgraded, has several adapters, or one that is fused, switched off, weighted
            differently in different layers, or trained with whole modules beside it; or the folder contains
            something else.
    """
    _, transformer = _upgraded_parts(pipe)
    for name, module in transformer.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise DavaeError(
                f"{name} was trained whole beside the LoRA (modules_to_save), and a LoRA file cannot hold it: save "
                "the merged pipeline with davae.save_pipeline, which includes it, or train without modules_to_save"
            )
    attached = acting_lora(transformer)
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in transformer.modules()):
        raise DavaeError("the LoRA is fused into the weights: call unfuse_lora() before saving the adapters")
    with claim(folder, "adapters") as inside:
        if attached is not None:
            _write_lora(pipe, transformer, *attached, inside)
        tensors, header = _widened(pipe, attached and attached[0])
        atomic_tensors(inside / LAYERS_FILE, tensors, metadata=header)
    return Path(folder)


def _widened(pipe: DiffusionPipeline, adapter: str | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The contents of ``davae_adapter.safetensors``: tensors and metadata."""
    vae, transformer = _upgraded_parts(pipe)
    layers = _widened_layers(transformer)
    header = _Header(
        format=FORMAT,
        pipeline=type(pipe).__name__,
        transformer=type(transformer).__name__,
        base_channels=vae.layout.base_channels,
        detail_channels=vae.layout.detail_channels,
        scale=vae.scale,
        layers=sorted(layers),
        adapter=adapter,
        scheduler=_configuration(pipe.scheduler),
    )
    tensors: dict[str, Tensor] = {f"transformer.{name}": value for name, value in layers.items()}
    tensors["check.transformer"] = Samples.of(_frozen(transformer)).values
    tensors["check.vae"] = Samples.of(dict(vae.named_parameters())).values
    return tensors, {"format": "pt", "davae": json.dumps(asdict(header), indent=1)}


def load_adapters(base: P, vae: AutoencoderDA | str | Path | None, folder: str | Path) -> P:
    """Upgrade a base pipeline and load what :func:`save_adapters` wrote: the tuned pipeline in one call.

    Args:
        base: the base pipeline, on any device and in any precision, which the result keeps (see
            :func:`upgrade_pipeline`); it is not changed, and shares its other parts with the result.
        vae: the autoencoder of the tuned pipeline, or its folder; not changed. ``None`` takes the one that
            ``davae export --adapters`` puts beside the files.
        folder: the folder of the two files, or its name on the hub.

    Returns:
        The tuned pipeline, of the base's class, with the LoRA attached: ``fuse_lora``, ``set_adapters`` and the like
        work if the class has them.

    Raises:
        DavaeError: a file is missing or damaged, the base or the autoencoder is not the one that was tuned (the first
            weight that differs is named), or a tensor is missing, unexpected, of another shape or not finite.
    """
    if not Path(folder).is_dir():
        with opening("adapters", str(folder)):
            files = [LAYERS_FILE, LORA_FILE, "autoencoder/*"]
            folder = snapshot_download(hub_name("adapters", str(folder)), allow_patterns=files)
    folder = Path(folder)
    header, tensors = _read(folder / LAYERS_FILE)
    if vae is None:
        vae = folder / "autoencoder"
    autoencoder = load_autoencoder(vae) if isinstance(vae, str | Path) else unwrapped(vae)
    _check_kind(base, autoencoder, header)
    _check_samples("autoencoder", tensors["check.vae"], dict(autoencoder.named_parameters()))
    pipe = upgrade_pipeline(base, autoencoder)
    transformer = pipe.transformer
    _check_samples("base's transformer", tensors["check.transformer"], _frozen(transformer))
    _put_layers(transformer, header, tensors)
    if header.adapter is not None:
        _load_lora(pipe, header.adapter, folder / LORA_FILE)
    find_family(pipe).join_parts(pipe)
    pipe.register_modules(scheduler=type(pipe.scheduler).from_config(header.scheduler))
    transformer.eval()
    return pipe


# ---------------------------------------------------------------------- widened layers


def _upgraded_parts(pipe: DiffusionPipeline) -> tuple[AutoencoderDA, nn.Module]:
    vae, transformer = (unwrapped(getattr(pipe, name, None)) for name in ("vae", "transformer"))
    if not isinstance(vae, AutoencoderDA) or not isinstance(transformer, nn.Module):
        raise DavaeError(f"this {type(pipe).__name__} is not upgraded: its VAE is a {type(vae).__name__}")
    return vae, transformer


def _configuration(scheduler: Any) -> dict[str, Any]:
    values = json.loads(scheduler.to_json_string())
    return {key: value for key, value in values.items() if key != "_name_or_path"}


def _plain_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The transformer's own parameters under their own names, whether a LoRA is attached or not."""
    tuned = [name for name, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)]
    plain = {}
    for name, parameter in transformer.named_parameters():
        owner = next((t for t in tuned if name.startswith(f"{t}.")), None)
        if owner is not None and not name.startswith(f"{owner}.base_layer."):
            continue  # a weight of the LoRA
        plain[name.replace(f"{owner}.base_layer.", f"{owner}.") if owner is not None else name] = parameter
    return plain


def _widened_layers(transformer: nn.Module) -> dict[str, nn.Parameter]:
    plain = _plain_parameters(transformer)
    places = [place.parameter for place in description_of(transformer).places]
    return {name: plain[name] for name in dict.fromkeys(places) if name in plain}


def _frozen(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that adapters do not change."""
    widened = _widened_layers(transformer)
    return {name: value for name, value in _plain_parameters(transformer).items() if name not in widened}


@torch.no_grad()
def _put_layers(transformer: nn.Module, header: _Header, tensors: dict[str, Tensor]) -> None:
    found = {name.removeprefix("transformer.") for name in tensors if name.startswith("transformer.")}
    layers = _widened_layers(transformer)
    if not found == set(header.layers) == set(layers):
        odd = sorted(found ^ set(layers) or found ^ set(header.layers))
        raise DavaeError(f"{LAYERS_FILE} and the transformer have different widened layers: {', '.join(odd)}")
    for name, parameter in layers.items():
        value = tensors[f"transformer.{name}"]
        if value.shape != parameter.shape:
            raise DavaeError(
                f"{LAYERS_FILE}: {name} has shape {tuple(value.shape)}, the transformer's {tuple(parameter.shape)}"
            )
        parameter.copy_(value)


# ---------------------------------------------------------------------- checks


def _read(file: Path) -> tuple[_Header, dict[str, Tensor]]:
    if not file.is_file():
        raise DavaeError(f"{file} does not exist: give a folder written by davae.save_adapters")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
        tensors = load_file(file)
    except SafetensorError as error:
        raise DavaeError(f"{file} is damaged: {error}") from error
    if bad := not_finite(tensors):
        raise DavaeError(f"{file}: {bad[0]} holds numbers that are not finite: save or fetch it again")
    if "davae" not in metadata:
        raise DavaeError(f"{file} was not written by davae: its header has no entry 'davae'")
    try:
        values = plain_json(metadata["davae"])
    except ValueError as error:
        raise DavaeError(f"{file} is damaged: its header's entry 'davae' is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise DavaeError(f"{file} is damaged: its header's entry 'davae' is not what davae writes")
    if values.get("format") != FORMAT:
        raise DavaeError(
            f"{file} has format {values.get('format')}, this davae reads {FORMAT}: update davae, or save the adapters "
            "again"
        )
    missing = {"check.transformer", "check.vae"} - tensors.keys()
    if missing:
        raise DavaeError(f"{file} lacks {', '.join(sorted(missing))}")
    try:
        return _Header(**values), tensors
    except TypeError as error:
        raise DavaeError(f"{file} is damaged: its header's entry 'davae' is incomplete ({error})") from error


def _check_kind(base: DiffusionPipeline, vae: AutoencoderDA, header: _Header) -> None:
    transformer = type(unwrapped(getattr(base, "transformer", None))).__name__
    for what, found, wanted in (
        ("the base's transformer is a", transformer, header.transformer),
        ("the autoencoder's scale is", vae.scale, header.scale),
        ("the autoencoder's base channels are", vae.layout.base_channels, header.base_channels),
        ("the autoencoder's detail channels are", vae.layout.detail_channels, header.detail_channels),
    ):
        if found != wanted:
            raise DavaeError(f"these adapters belong to another pipeline: {what} {found}, not {wanted}")


def _check_samples(what: str, saved: Tensor, parameters: dict[str, nn.Parameter]) -> None:
    differing = Samples(saved).first_difference(parameters)
    if differing is not None:
        raise DavaeError(f"these adapters were tuned with another {what}: {differing}")


# ---------------------------------------------------------------------- a few values of every weight


@dataclass(frozen=True)
class Samples:
    """Values of a model's parameters in the order of their names.

    Attributes:
        values: float32 ``[n]``, up to ``SAMPLES`` for each floating-point parameter.
    """

    values: Tensor

    @classmethod
    def of(cls, parameters: Mapping[str, Tensor]) -> Samples:
        """Take the values; parameters that are not floating-point (quantised ones) are skipped."""
        return cls(torch.cat([torch.zeros(0), *(values for _, values in _taken(parameters))]))

    def first_difference(self, parameters: Mapping[str, Tensor]) -> str | None:
        """How a model first differs from the one the values were taken from, in words; None if they agree.

        The same weights in another precision agree: if one side was rounded, the other is rounded too.
        """
        start = 0
        for name, found in _taken(parameters):
            wanted = self.values[start : start + len(found)]
            start += len(found)
            if len(wanted) < len(found):
                return f"it has more weights, such as '{name}'"
            if not _same(found, wanted):
                return f"'{name}' has other values"
        return None if start == len(self.values) else "it has fewer weights"


def _taken(parameters: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
    taken = []
    for name in sorted(parameters):
        flat = parameters[name].detach().flatten()
        if flat.is_floating_point() and len(flat):
            positions = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64)
            taken.append((name, flat[positions.round().long().to(flat.device)].float().cpu()))
    return taken


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether both are the same numbers, up to the precision in which either was stored."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if (_fits(a, dtype) or _fits(b, dtype)) and same_values(a.to(dtype), b.to(dtype)):
            return True
    halves = (torch.bfloat16, torch.float16)
    mixed = any(_fits(a, x) and _fits(b, y) for x, y in (halves, halves[::-1]))
    return mixed and torch.allclose(a, b, rtol=_ROUNDING, atol=1e-6, equal_nan=True)


def _fits(values: Tensor, dtype: torch.dtype) -> bool:
    return same_values(values.to(dtype).float(), values)


# ---------------------------------------------------------------------- LoRA


def lora_metadata(config: LoraConfig) -> dict[str, Any]:
    """The configuration in a LoRA file: rank, alpha, targets, and what differs from the defaults.

    Older versions of peft do not know every option of newer ones, and readers pass all of the entries to peft.
    """
    said, defaults = config.to_dict(), LoraConfig().to_dict()
    always = ("r", "lora_alpha", "target_modules")
    kept = {key: said[key] for key in said if key in always or said[key] != defaults.get(key)}
    return {key: sorted(v) if isinstance(v, set) else v for key, v in kept.items() if key not in _OF_A_FILE}


_OF_A_FILE = ("peft_version", "base_model_name_or_path", "revision", "inference_mode")  # not about the LoRA itself


def _write_lora(pipe: DiffusionPipeline, transformer: nn.Module, name: str, config: LoraConfig, folder: Path) -> None:
    weights = get_peft_model_state_dict(transformer, adapter_name=name)
    weights = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    metadata = lora_metadata(config)
    if hasattr(pipe, "save_lora_weights"):
        type(pipe).save_lora_weights(
            folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
        )
        return
    values = {f"transformer.{k}": v for k, v in metadata.items()}
    atomic_tensors(
        folder / LORA_FILE,
        {f"transformer.{key}": value for key, value in weights.items()},
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(values, indent=2, sort_keys=True)},
    )


def _load_lora(pipe: DiffusionPipeline, name: str, file: Path) -> None:
    """Attach the LoRA, and check that every tensor of the file was loaded."""
    if not file.is_file():
        raise DavaeError(f"{file} does not exist: {LAYERS_FILE} beside it belongs to a LoRA")
    transformer = pipe.transformer
    if bad := not_finite(load_file(file)):
        raise DavaeError(f"{file}: {bad[0]} holds numbers that are not finite: save or fetch it again")
    saved = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    if hasattr(transformer, "load_lora_adapter"):
        transformer.load_lora_adapter(file.parent, prefix="transformer", weight_name=file.name, adapter_name=name)
    else:
        with safe_open(file, framework="pt") as opened:
            values = json.loads(opened.metadata()[LORA_ADAPTER_METADATA_KEY])
        config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in values.items()})
        attach_lora(transformer, config, name)
        set_peft_model_state_dict(transformer, saved, adapter_name=name)
    taken = get_peft_model_state_dict(transformer, adapter_name=name)
    if saved.keys() != taken.keys():
        odd = sorted(saved.keys() ^ taken.keys())
        raise DavaeError(f"{file}: {len(odd)} tensors do not fit the transformer, the first is {odd[0]}")
    for key, value in saved.items():
        if not same_values(value.to(taken[key]), taken[key]):
            raise DavaeError(f"{file}: {key} was not loaded into the transformer")
