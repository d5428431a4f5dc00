"""The architecture of a pipeline without its weights, found by name and built on the meta device."""

from __future__ import annotations

import copy
import difflib
import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import ModelMixin
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn

import davae.models
import davae.pipelines
from davae.bases.open import built_in
from davae.errors import DavaeError, first_line
from davae.latents import LatentLayout
from davae.models import AutoencoderDA, find_adapter
from davae.models.base_adapters.adapter import constructor_arguments
from davae.pipelines.families import find_family
from davae.pipelines.saving.opening import is_model_alone
from davae.planner.memory import Cost, ShapesOnly
from davae.recipes.presets import License, find_preset, preset_names
from davae.runtime.text_files import read_object
from davae.warm_start import description_of
from davae.warm_start.patterns import pattern_count

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Architecture:
    """A pipeline's configurations.

    Attributes:
        name: that it was found by.
        pipeline: class name of the pipeline.
        transformer, vae: configurations with ``_class_name``.
        text_encoders: configurations in the form of transformers (``architectures``, ``model_type``), by name.
        resolution: side of the image in pixels that the base was published for, if known.
        license: of the weights, if known.
        source: where the values come from, in words.
        steps: denoising steps, if they differ from the pipeline's default.
    """

    name: str
    pipeline: str
    transformer: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: dict[str, dict[str, Any]]
    resolution: int | None = None
    license: License | None = None
    source: str = ""
    steps: int | None = None

    def require_transformer(self) -> None:
        """Check that this is a whole pipeline.

        Raises:
            DavaeError: it is an autoencoder by itself, on which stage 1 can be trained.
        """
        if not self.transformer:
            raise DavaeError(
                f"{self.name} is an autoencoder by itself, which stage 1 (davae train autoencoder) can be trained on; "
                "all else needs the pipeline: name its folder or its name on the hub as base"
            )

    # Models, on the meta device: shapes without memory.

    def build_transformer(self, detail_channels: int = 0) -> ModelMixin:
        """The transformer; with `detail_channels` the widened one."""
        transformer = build(self.transformer)
        if not detail_channels:
            return transformer
        layout = LatentLayout(self.base_channels, detail_channels)
        return build({**self.transformer, **widened_config(transformer, layout)})

    def build_vae(self) -> ModelMixin:
        """The base autoencoder."""
        return build(self.vae)

    def build_autoencoder(self, scale: int, detail_channels: int | tuple[int, ...]) -> AutoencoderDA:
        """The upgraded autoencoder: one level, or one for each number of channels, of equal factors."""
        added = (detail_channels,) if isinstance(detail_channels, int) else detail_channels
        factor = round(scale ** (1 / len(added)))
        if factor ** len(added) != scale:
            raise DavaeError(f"{len(added)} levels of detail channels cannot share scale {scale} evenly")
        name = str(self.vae["_class_name"])
        model_class, _ = find_adapter(name)
        config = constructor_arguments(model_class, self.vae)
        for channels in added:
            with torch.device("meta"):
                model = AutoencoderDA(
                    base_class=name,
                    base_config=config,
                    scale=factor,
                    detail_channels=channels,
                    down_method="stride",  # the recipes' default, and the larger one
                )
            name, config = "AutoencoderDA", constructor_arguments(AutoencoderDA, model.config)
        return model

    def text_encoder_sizes(self) -> list[TextEncoderSize]:
        """The sizes of the text encoders."""
        return [_text_encoder_size(name, config) for name, config in self.text_encoders.items()]

    # Facts of the pipeline.

    @property
    def base_channels(self) -> int:
        """``C``: latent channels of the base autoencoder."""
        return int(self.vae["z_dim"] if "z_dim" in self.vae else self.vae["latent_channels"])

    @property
    def base_compression(self) -> int:
        """``f``: pixels per side of one latent position."""
        _, adapter = find_adapter(str(self.vae["_class_name"]))
        return adapter.probe_encoder(adapter.detail_encoder(self.build_vae()))[1]

    @property
    def patch(self) -> int:
        """Latent positions per side of one token, packing by the pipeline included."""
        packing = math.isqrt(int(self.transformer["in_channels"]) // self.base_channels)
        return packing if packing > 1 else int(self.transformer.get("patch_size") or 1)

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt in the transformer, at the pipeline's default length."""
        return self.text_tokens_at(self.prompt_length)

    @property
    def prompt_length(self) -> int:
        """Tokens that the pipeline pads a prompt to by default."""
        return int(_defaults(self.pipeline).get("max_sequence_length") or 256)

    def text_tokens_at(self, length: int) -> int:
        """Tokens in the transformer for prompts padded to `length`; 0 without prompts."""
        if not self.text_encoders:
            return 0
        return length + find_family(self.pipeline).extra_text_tokens

    @property
    def denoising_steps(self) -> int:
        """Denoising steps of an image: the model's own, else the pipeline's default."""
        return self.steps or int(_defaults(self.pipeline).get("num_inference_steps") or 50)

    @property
    def passes(self) -> int:
        """Transformer passes per step: 2 with classifier-free guidance at the pipeline's default, else 1."""
        defaults = _defaults(self.pipeline)
        if "true_cfg_scale" in defaults:
            return 2 if (defaults["true_cfg_scale"] or 0) > 1 else 1
        if self.transformer.get("guidance_embeds"):
            return 1
        return 2 if (defaults.get("guidance_scale") or 0) > 1 else 1


@dataclass(frozen=True)
class TextEncoderSize:
    """Attributes: component name; class; ``model_type`` of transformers; number of parameters; number of those used for
    each token of a prompt.
    """

    name: str
    class_name: str
    kind: str
    parameters: int
    multiplied: int


def build(config: Mapping[str, Any], device: str = "meta") -> ModelMixin:
    """A model from a configuration with ``_class_name``, in float32: on the meta device, or with random weights.

    Raises:
        DavaeError: an unknown class, or values that the class does not take.
    """
    name = str(config.get("_class_name"))
    model_class = getattr(davae.models, name, None) or getattr(diffusers, name, None)
    if model_class is None:
        raise DavaeError(f"neither diffusers nor davae has a model class {name}")
    try:
        with _built_on(device):
            return model_class.from_config(dict(config))
    except (TypeError, ValueError, RuntimeError) as error:
        raise DavaeError(f"{name} cannot be built from its configuration: {error}") from error


def widened_config(transformer: ModelMixin, layout: LatentLayout) -> dict[str, int]:
    """The entries of the transformer's configuration that change when it is widened.

    Raises:
        WarmStartError: its channels are not those of the layout's base, or its class has no description.
    """
    description = description_of(transformer).fitted(transformer, layout.base_channels)
    sizes = description.resolve_sizes(transformer)
    return {
        key: pattern_count(str(pattern), sizes, layout.channels)
        for key, pattern in description.counts.items()
        if transformer.config[key] is not None  # else it depends on another key
    }


def find_architecture(base: str | Path | DiffusionPipeline) -> Architecture:
    """The architecture of a pipeline, its folder, a bundled configuration's name, or a name on the hub.

    Names mean what they mean to :func:`davae.bases.open.load_base`; those of bundled configurations need no network.
    An autoencoder by itself gives an architecture without a transformer.

    Raises:
        DavaeError: nothing of that name, or a pipeline without a transformer.
    """
    if isinstance(base, DiffusionPipeline):
        return _of_pipeline(base, type(base).__name__)
    name = str(base)
    pipe = built_in(name)
    if pipe is not None:
        return _of_pipeline(pipe, name)
    preset = find_preset(name)
    if preset is not None:
        return Architecture(
            name=preset.name,
            pipeline=preset.pipeline,
            transformer=preset.transformer,
            vae=preset.vae,
            text_encoders=preset.text_encoders,
            resolution=preset.resolution,
            license=preset.license,
            source=f"bundled configuration '{preset.key}' ({preset.source})",
            steps=preset.steps,
        )
    if is_model_alone(Path(name)):
        return _of_autoencoder(name, Path(name) / "config.json")
    if Path(name).is_dir():
        return _of_files(name, lambda file: Path(name) / file, f"folder {name}")
    if "/" not in name:
        close = difflib.get_close_matches(name.lower(), preset_names(), n=3, cutoff=0.4)
        listed = f"the closest: {', '.join(close)}" if close else ", ".join(preset_names())
        raise DavaeError(
            f"no pipeline '{name}': it is not a folder, not a bundled configuration ({listed}), and no name of the "
            "hub, which would be user/name"
        )
    try:
        _download(name, "model_index.json")
    except DavaeError as error:
        cause = error.__cause__
        if not isinstance(cause, EntryNotFoundError) or isinstance(cause, LocalEntryNotFoundError):
            raise
        return _of_autoencoder(name, Path(_download(name, "config.json")))
    return _of_files(name, lambda file: Path(_download(name, file)), f"{name} on the hub")


def _of_autoencoder(name: str, config: Path) -> Architecture:
    """That of an autoencoder by itself."""
    vae = read_object(config)
    return Architecture(name, pipeline="", transformer={}, vae=vae, text_encoders={}, source=f"autoencoder in {name}")


def _of_pipeline(pipe: DiffusionPipeline, name: str) -> Architecture:
    transformer, vae = pipe.components.get("transformer"), pipe.components.get("vae")
    if transformer is None or vae is None:
        raise DavaeError(f"{type(pipe).__name__} has no transformer or no vae: there is nothing to plan")
    encoders = {
        key: {**value.config.to_dict(), "architectures": [type(value).__name__]}
        for key, value in pipe.components.items()
        if key.startswith("text_encoder") and value is not None
    }
    return Architecture(
        name=name,
        pipeline=type(pipe).__name__,
        transformer={**transformer.config, "_class_name": type(transformer).__name__},
        vae={**vae.config, "_class_name": type(vae).__name__},
        text_encoders=encoders,
        source="the pipeline itself",
    )


def _of_files(name: str, file: Callable[[str], Path], source: str) -> Architecture:
    index = _read_json(file("model_index.json"), name)
    if "transformer" not in index or "vae" not in index:
        raise DavaeError(
            f"{name} is a {index.get('_class_name')} without a transformer or without a vae: davae upgrades "
            "pipelines of latent diffusion transformers"
        )
    encoders = [k for k, v in index.items() if k.startswith("text_encoder") and isinstance(v, list) and v[0]]
    return Architecture(
        name=name,
        pipeline=str(index["_class_name"]),
        transformer=_read_json(file("transformer/config.json"), name),
        vae=_read_json(file("vae/config.json"), name),
        text_encoders={key: _read_json(file(f"{key}/config.json"), name) for key in encoders},
        source=source,
    )


def _read_json(file: Path, name: str) -> dict[str, Any]:
    if not file.is_file():
        raise DavaeError(f"{name} is not a pipeline folder: it has no {file}")
    return read_object(file)


def _download(name: str, file: str) -> str:
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.CRITICAL)  # its retries are logged one by one, and once more in the error below
    try:
        return str(hf_hub_download(name, file))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise DavaeError(
            f"no pipeline '{name}': it is not a folder, not a bundled configuration ({', '.join(preset_names())}), "
            f"and {file} could not be fetched from the hub ({type(error).__name__}: {first_line(error)})"
        ) from error
    finally:
        hub.setLevel(level)


def _defaults(pipeline: str) -> dict[str, Any]:
    """Default arguments of a pipeline's call."""
    found = getattr(davae.pipelines, pipeline, None) or getattr(diffusers, pipeline, None)
    if found is None:
        logger.warning("%s is neither in diffusers nor in davae: its sampling defaults are unknown", pipeline)
        return {}
    parameters = inspect.signature(found.__call__).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def build_text_encoder(name: str, config: Mapping[str, Any], device: str = "meta") -> nn.Module:
    """A text encoder from its configuration: on the meta device, or with random weights.

    Raises:
        DavaeError: transformers does not know the class.
    """
    class_name = (config.get("architectures") or [""])[0]
    model_class = getattr(transformers, class_name, None)
    if model_class is None or "model_type" not in config:
        raise DavaeError(f"{name}: transformers has no class '{class_name}' (config key architectures)")
    rest = {k: v for k, v in config.items() if k != "architectures"}
    with _built_on(device):
        encoder: nn.Module = model_class(transformers.AutoConfig.for_model(**rest))
    return encoder


@contextmanager
def _built_on(device: str) -> Iterator[None]:
    """Context that creates tensors on the device without changing the global generator; on meta nothing is drawn."""
    values = ShapesOnly() if device == "meta" else nullcontext()
    with torch.random.fork_rng(devices=[]), torch.device(device), values:
        yield


def _text_encoder_size(name: str, config: Mapping[str, Any]) -> TextEncoderSize:
    encoder = build_text_encoder(name, config)
    looked_up = {f"{n}.weight" for n, m in encoder.named_modules() if isinstance(m, nn.Embedding)}
    total = multiplied = 0
    for parameter_name, parameter in encoder.named_parameters():
        total += parameter.numel()
        unused = any(part.startswith(("vis", "lm_head")) for part in parameter_name.split("."))
        if parameter_name not in looked_up and not unused:
            multiplied += parameter.numel()
    return TextEncoderSize(name, type(encoder).__name__, str(config["model_type"]), total, multiplied)


_MEASURED = 2  # blocks of each run in the shortest model


@dataclass(frozen=True)
class BlockRun:
    """Consecutive equal blocks of one list. Attributes: the list's name, first index, number."""

    name: str
    first: int
    count: int


def block_runs(model: nn.Module) -> list[BlockRun]:
    """The runs of equal blocks in the model's lists; empty if blocks are connected to each other by number.

    Blocks are equal if their parameters have the same names and shapes.
    """
    if any("skip" in name for name, _ in model.named_parameters()):
        return []  # a U-shape pairs its blocks
    runs = []
    for name, blocks in model.named_children():
        if not isinstance(blocks, nn.ModuleList):
            continue
        shapes = [[(n, p.shape) for n, p in block.named_parameters()] for block in blocks]
        first = 0
        for i in range(1, len(shapes) + 1):
            if i == len(shapes) or shapes[i] != shapes[first]:
                runs.append(BlockRun(name, first, i - first))
                first = i
    return runs


def cost_by_depth(measure: Callable[[Callable[[nn.Module], nn.Module]], Cost], runs: list[BlockRun]) -> Cost:
    """The cost of a deep model from those of short ones, each measured by ``measure(shorten)``.

    Operations are exact. So is the memory if all blocks of a run keep the same amount; the peak of checkpointed
    blocks lies within one run, whose interior counts once.

    Args:
        measure: builds the model, applies ``shorten`` to it, and runs it.
        runs: of the deep model.
    """
    shortest = {i: min(run.count, _MEASURED) for i, run in enumerate(runs)}
    base = measure(lambda model: _shorten(model, runs, shortest))
    flops, peak = base.flops, base.peak_bytes
    for i, run in enumerate(runs):
        left = run.count - shortest[i]
        if left:
            longer = {**shortest, i: shortest[i] + 1}
            more = measure(lambda model, longer=longer: _shorten(model, runs, longer))  # type: ignore[misc]
            flops += left * (more.flops - base.flops)
            peak += left * (more.peak_bytes - base.peak_bytes)
    return Cost(flops, peak)


def shallow_copy(model: nn.Module) -> nn.Module:
    """The same modules under a copy of the outermost one, whose lists can be shortened."""
    other = copy.copy(model)
    vars(other)["_modules"] = dict(model._modules)
    return other


def _shorten(model: nn.Module, runs: list[BlockRun], counts: dict[int, int]) -> nn.Module:
    for name in {run.name for run in runs}:
        blocks = getattr(model, name)
        kept = [blocks[run.first + k] for i, run in enumerate(runs) if run.name == name for k in range(counts[i])]
        setattr(model, name, nn.ModuleList(kept))
    return model
