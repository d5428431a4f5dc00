"""From a published file to a diffusers folder, as in ``davae convert``."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from davae.choices import ChannelOrder
from davae.errors import DavaeError
from davae.interop import official_lightningdit
from davae.interop.comfyui import load_model, read_header, write_adapters
from davae.interop.official_autoencoders import convert_imagenet, convert_sd3
from davae.interop.official_vavae import convert_vavae
from davae.interop.sd3_transformer_files import convert_transformer, is_transformer
from davae.latents import LatentLayout
from davae.latents.statistics import check_channel_statistics
from davae.models import AutoencoderDA, LightningDiTTransformer2DModel
from davae.models.latent_space import open_autoencoder
from davae.pipelines import ClassConditionalPipeline, load_pipeline
from davae.pipelines.families import fit_to_autoencoder
from davae.pipelines.saving.opening import opening
from davae.pipelines.upgrade import layout_over, scheduler_for
from davae.runtime.places import check_place, claim
from davae.runtime.text_files import read_json
from davae.runtime.weight_files import about_file, read_state_dict, read_tensors

logger = logging.getLogger(__name__)

Which = Literal["ema", "model"]
Statistics = tuple[list[float], list[float]]
OFFICIAL_SHIFT = 0.3  # of LightningDiT's sampler, in t = 1 - sigma
SD3_SHIFT = 4.0  # of the authors' released SD3.5 configuration, in sigma


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        out: the folder.
        kind: class name, with the size if it has a name.
        parameters: their number.
        unused: official tensors that it does not use.
    """

    out: Path
    kind: str
    parameters: int
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = f"; {len(self.unused)} tensors of training left out" if self.unused else ""
        count = f"{self.parameters / 1e6:.1f}M" if self.parameters >= 1e6 else f"{self.parameters:,}"
        return f"{self.out}: {self.kind}, {count} parameters{left}"


def convert_lightningdit_file(
    file: Path,
    out: Path,
    *,
    weights: Which = "ema",
    heads: int | None = None,
    size: str | None = None,
    vae: Path | None = None,
) -> Converted:
    """A LightningDiT checkpoint to a transformer's folder, or with ``vae`` to a whole pipeline's.

    Args:
        file: as published.
        out: a new or an empty folder.
        weights: which to take if the file has both.
        heads: if the weights do not determine it, see :func:`davae.interop.official_lightningdit.convert`.
        size: the expected size, for example ``XL/1``.
        vae: folder of its autoencoder. The pipeline's scheduler gets the official shift, 0.3 in t.

    Raises:
        DavaeError: not a LightningDiT as published, another size, or an autoencoder that does not fit.
    """
    check_place(out, "result")
    model = official_lightningdit.load(file, weights=weights, num_attention_heads=heads)
    found = official_lightningdit.size_name(model.config)
    if size is not None and size.lower() != found.lower():
        raise DavaeError(f"{file} is LightningDiT-{found}, not {size}")
    if vae is None:
        _save(model, out)
    else:
        _save(_pipeline(model, vae), out)
    return Converted(out, f"LightningDiT-{found}", _count(model))


def convert_vavae_file(file: Path, out: Path, *, resolution: int = 256, statistics: Path | None = None) -> Converted:
    """A VA-VAE, or another LDM autoencoder, to the folder of an ``AutoencoderKL``.

    Args:
        file: as published.
        out: a new or an empty folder.
        resolution: image size in pixels that it was trained at.
        statistics: the file of the latent's statistics, see :func:`read_statistics`.
    """
    check_place(out, "result")
    read, state = read_statistics(statistics), read_state_dict(file)
    with about_file(file):
        model, unused = convert_vavae(state, resolution=resolution, statistics=read)
    return _saved(model, out, unused)


def convert_imagenet_file(
    file: Path, out: Path, *, base: Path | None = None, resolution: int = 256, statistics: Path | None = None
) -> Converted:
    """The authors' ImageNet autoencoder to the folder of an ``AutoencoderDA``.

    Args:
        file: as published.
        out: a new or an empty folder.
        base: folder of the VA-VAE, whose decoder the file does not contain; only ``decode_base`` needs it.
        resolution: image size of the base in pixels.
        statistics: of all channels, see :func:`read_statistics`.
    """
    check_place(out, "result")
    vae = None if base is None else _vae(base)
    read, state = read_statistics(statistics), read_state_dict(file)
    with about_file(file):
        model, unused = convert_imagenet(state, base=vae, base_resolution=resolution, statistics=read)
    return _saved(model, out, unused)


def convert_sd3_file(
    file: Path,
    out: Path,
    *,
    base: Path,
    statistics: Path | None = None,
    weights: Which = "ema",
    lora: Path | None = None,
    vae: Path | None = None,
    order: ChannelOrder = "detail_first",
) -> Converted:
    """A file of the authors' SD3 track: the autoencoder or the tuned transformer, recognised by its tensors' names.

    Args:
        file: as published.
        out: a new or an empty folder: of an ``AutoencoderDA``, of an ``SD3Transformer2DModel``, or with ``vae`` of a
            whole pipeline.
        base: folder of the SD3 VAE or of the pretrained transformer, as the file needs, or of a pipeline with both.
        statistics: of the detail channels, see :func:`read_statistics`; for the autoencoder.
        weights: which to take if the file has both.
        lora: file of the transformer's LoRA, if it is separate.
        vae: folder of the converted autoencoder: writes the upgraded pipeline, whose other parts are the base's and
            whose scheduler gets the authors' shift, 4.
        order: channel order in a transformer without branches.

    Raises:
        DavaeError: neither of the two as published, an option of the other kind, or parts that do not fit.
    """
    check_place(out, "result")
    state = read_state_dict(file, entries=_sd3_entries(weights))
    if is_transformer(state):
        if statistics is not None:
            raise DavaeError(f"{file} is a transformer: the statistics belong to the autoencoder's conversion")
        with about_file(file):
            transformer, layout = convert_transformer(state, base, lora=lora, order=order)
        if vae is None:
            _save(transformer, out)
        else:
            _save(_sd3_pipeline(transformer, layout, base, vae), out)
        kind = f"{type(transformer).__name__}, {layout.base_channels} + {layout.detail_channels} channels"
        return Converted(out, kind, _count(transformer))
    if lora is not None or vae is not None:
        raise DavaeError(f"{file} is no transformer of SD3: --lora and --vae go with the transformer's file")
    base_vae, read = _vae(base), read_statistics(statistics)
    with about_file(file):
        model, unused = convert_sd3(state, dict(base_vae.config), base=base_vae, statistics=read)
    return _saved(model, out, unused)


def convert_comfyui_file(file: Path, out: Path, *, base: str | None = None, vae: Path | None = None) -> Converted:
    """A file of ``davae export --format comfyui`` to the folder of a model, of adapters, or of a whole pipeline.

    Args:
        file: see :mod:`davae.interop.comfyui`.
        out: a new or an empty folder.
        base: with ``vae``, for a transformer: folder or hub name of the base pipeline, whose other parts are taken.
        vae: the autoencoder's file.

    Raises:
        DavaeError: not such a file, or parts that do not belong together.
    """
    check_place(out, "result")
    header = read_header(file)
    if (base is None) != (vae is None) or (base is not None and header.kind != "transformer"):
        raise DavaeError("--base and --vae go together, with the transformer's file")
    if header.kind == "adapters":
        with claim(out, "result") as folder:
            write_adapters(file, folder)
        return Converted(out, "adapters", sum(value.numel() for value in read_tensors(file).values()))
    model = load_model(file)
    if isinstance(model, AutoencoderDA):
        return _saved(model, out, [])
    if base is not None and vae is not None:
        read_header(vae, "autoencoder")
        autoencoder: Any = load_model(vae)
        pipe = load_pipeline(base, transformer=model, dtype=model.dtype)
        scheduler = type(pipe.scheduler).from_config(header.scheduler)
        layout = LatentLayout(header.base_channels, header.detail_channels)
        _save(_joined(pipe, model, layout, autoencoder, scheduler, about=vae), out)
    else:
        _save(model, out)
    return Converted(out, f"{type(model).__name__}, {header.channels} channels", _count(model))


def _sd3_entries(weights: Which) -> tuple[str, ...]:
    other = "model" if weights == "ema" else "ema"
    return (f"{weights}_state_dict", weights, f"{other}_state_dict", other, "state_dict")


def _sd3_pipeline(
    transformer: SD3Transformer2DModel, layout: LatentLayout, base: Path, folder: Path
) -> DiffusionPipeline:
    """The base pipeline with the converted autoencoder and transformer."""
    vae = _vae(folder)
    if not isinstance(vae, AutoencoderDA):
        raise DavaeError(f"{folder} holds a {type(vae).__name__}: convert the authors' autoencoder first")
    pipe = load_pipeline(base, transformer=transformer, dtype=transformer.dtype)
    scheduler = scheduler_for(pipe, SD3_SHIFT, scale=vae.scale, channels=(layout.base_channels, layout.channels))
    return _joined(pipe, transformer, layout, vae, scheduler, about=folder)


def _joined(
    pipe: DiffusionPipeline,
    transformer: SD3Transformer2DModel,
    layout: LatentLayout,
    vae: AutoencoderDA,
    scheduler: Any,
    *,
    about: Path,
) -> DiffusionPipeline:
    """The pipeline with these parts in place of its own; the autoencoder, read from ``about``, must fit the others."""
    expected = layout_over(pipe.vae, vae)
    if expected != layout:
        raise DavaeError(
            f"the transformer has {layout.base_channels} + {layout.detail_channels} channels, the autoencoder of "
            f"{about} {expected.base_channels} + {expected.detail_channels}"
        )
    parts = pipe.components | {"vae": vae.to(transformer.dtype), "scheduler": scheduler}
    return fit_to_autoencoder(type(pipe)(**parts))


def read_statistics(file: Path | None) -> Statistics | None:
    """Mean and standard deviation of each channel: ``mean`` and ``std`` in a JSON file or a file of tensors.

    Raises:
        DavaeError: no such file, or its contents are not such statistics.
    """
    if file is None:
        return None
    if file.suffix == ".json":
        if not file.is_file():
            raise DavaeError(f"there is no file {file}")
        content: Any = read_json(file)
    else:
        content = read_tensors(file)
    if not isinstance(content, dict) or not {"mean", "std"} <= content.keys():
        raise DavaeError(f"{file} must hold 'mean' and 'std', one value a channel each")
    mean, std = (_flat(content[name]) for name in ("mean", "std"))
    if len(mean) != len(std) or not mean:
        raise DavaeError(f"{file}: {len(mean)} means and {len(std)} deviations: it must be one a channel in both")
    with about_file(file):
        check_channel_statistics("mean", mean, "std", std, len(mean))
    return mean, std


def _flat(values: Any) -> list[float]:
    try:
        tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise DavaeError(f"statistics must be numbers, one a channel: {error}") from error
    return [float(value) for value in tensor.flatten()]


def _pipeline(transformer: LightningDiTTransformer2DModel, folder: Path) -> ClassConditionalPipeline:
    vae = _vae(folder)
    if not getattr(vae.config, "latents_mean", None):
        logger.warning(
            "%s has no statistics of its channels: LightningDiT was trained on normalised latents. "
            "Convert the autoencoder with --statistics",
            folder,
        )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / OFFICIAL_SHIFT)
    return ClassConditionalPipeline(vae=vae, transformer=transformer, scheduler=scheduler)


def _vae(folder: Path) -> AutoencoderKL | AutoencoderDA:
    """The autoencoder in a folder, or that of the pipeline in it."""
    with opening("autoencoder", str(folder)):
        vae = open_autoencoder(folder)
    if not isinstance(vae, AutoencoderKL | AutoencoderDA):
        raise DavaeError(f"{folder} holds a {type(vae).__name__}: expected an AutoencoderKL or AutoencoderDA")
    return vae


def _save(model: ModelMixin | DiffusionPipeline, out: Path) -> None:
    with claim(out, "result") as folder:
        model.save_pretrained(folder)


def _count(model: ModelMixin) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _saved(model: Any, out: Path, unused: list[str]) -> Converted:
    """Save an autoencoder and describe the result."""
    _save(model, out)
    if isinstance(model, AutoencoderDA):
        compression, layout = model.spatial_compression, model.layout
        channels = f"{layout.base_channels} + {layout.detail_channels}"
    else:
        compression = 2 ** (len(model.config.block_out_channels) - 1)
        channels = str(model.config.latent_channels)
    kind = f"{type(model).__name__} f{compression}, {channels} channels"
    return Converted(out, kind, _count(model), unused)
