"""Single files for ComfyUI: an upgraded pipeline's transformer, autoencoder, or LoRA with its widened layers, and back.

ComfyUI sorts models by kind into folders of its ``models``; a file holds what diffusers keeps in a folder:

* ``diffusion_models/NAME.safetensors``: the transformer under diffusers' names, which ComfyUI translates itself;
* ``vae/NAME.safetensors``: the :class:`davae.AutoencoderDA`;
* ``loras/NAME.safetensors``: the LoRA under diffusers' names with ``.alpha`` per layer, which ComfyUI reads, and the
  contents of ``davae_adapter.safetensors`` under ``davae.``: layers that are wider than the base's.

What tensors do not tell (configurations, channels, shift) is JSON under the key ``davae`` of the file's metadata.
ComfyUI's model of Stable Diffusion 3 fixes 64 channels a head and as many heads as blocks, as the published ones have.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import SD3Transformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from davae.errors import DavaeError
from davae.interop.checking import check_keys
from davae.models import AutoencoderDA
from davae.pipelines.saving.adapters import LORA_FILE
from davae.pipelines.saving.opening import LAYERS_FILE, load_autoencoder
from davae.runtime.model_files import chosen_variant, component_files, stored_keys
from davae.runtime.text_files import plain_json, read_object
from davae.runtime.weight_files import about_file, atomic_tensors, read_finite

Kind = Literal["transformer", "autoencoder", "adapters"]

FOLDERS: dict[Kind, str] = {"transformer": "diffusion_models", "autoencoder": "vae", "adapters": "loras"}
"""The folder of ComfyUI's ``models`` for each kind of file."""
FORMAT = 1
_METADATA, _LAYER = "davae", "davae."
WIDENED = {
    "pos_embed.proj.weight": "x_embedder.proj.weight",
    "pos_embed.proj.bias": "x_embedder.proj.bias",
    "proj_out.weight": "final_layer.linear.weight",
    "proj_out.bias": "final_layer.linear.bias",
}
"""The widened parameters of ``SD3Transformer2DModel`` by their names in ComfyUI's."""


@dataclass(frozen=True)
class Header:
    """The metadata of a file.

    Attributes:
        kind: what the file holds.
        base_channels, detail_channels, scale: of the autoencoder.
        scaling_factor, shift_factor: model space is ``(latent - shift_factor) * scaling_factor``, in all channels.
        config: of the model; of adapters the metadata of both of their files.
        scheduler: of the pipeline; its ``shift`` is what sampling needs.
        format: of the file.
    """

    kind: Kind
    base_channels: int
    detail_channels: int
    scale: int
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    config: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def channels(self) -> int:
        """Of the structured latent."""
        return self.base_channels + self.detail_channels

    @property
    def shift(self) -> float:
        """The scheduler's timestep shift."""
        return float(self.scheduler.get("shift", 1.0))


# ---------------------------------------------------------------------- to ComfyUI


def write_single_files(source: Path, out: Path, name: str, *, autoencoder: Path | None = None) -> list[Path]:
    """Write the files of a saved pipeline, autoencoder or adapters below a folder that is laid out as ComfyUI's.

    Without detail channels the transformer is the base's own, of which ComfyUI has a file already: it is left out.

    Args:
        source: folder of one of the three, as davae saves it.
        out: an existing folder.
        name: of the files, without ending.
        autoencoder: folder of the autoencoder that belongs to adapters.

    Returns:
        The files, relative to ``out``.

    Raises:
        DavaeError: the pipeline is not of Stable Diffusion 3, or of sizes or with a schedule that ComfyUI does not
            have; a file is missing, damaged or not finite.
    """
    made: dict[Kind, tuple[Header, dict[str, Tensor]]]
    if (source / LAYERS_FILE).is_file():
        if autoencoder is None:
            raise DavaeError(f"{source} holds adapters: give the folder of their autoencoder too")
        made = {"adapters": _adapters(source, autoencoder), "autoencoder": _autoencoder(autoencoder)}
    elif (source / "model_index.json").is_file():
        made = {"autoencoder": _autoencoder(source / "vae")}
        header = made["autoencoder"][0]
        if header.detail_channels:
            made["transformer"] = _transformer(source, header)
    else:
        made = {"autoencoder": _autoencoder(source)}
    files = []
    for kind, (header, tensors) in made.items():
        file = Path(FOLDERS[kind]) / f"{name}.safetensors"
        atomic_tensors(out / file, tensors, metadata={"format": "pt", _METADATA: json.dumps(asdict(header))})
        files.append(file)
    return files


def _autoencoder(folder: Path) -> tuple[Header, dict[str, Tensor]]:
    vae = load_autoencoder(folder, dtype="saved")
    header = Header(
        kind="autoencoder",
        base_channels=vae.layout.base_channels,
        detail_channels=vae.layout.detail_channels,
        scale=vae.scale,
        scaling_factor=float(vae.config.get("scaling_factor") or 1.0),
        shift_factor=float(vae.config.get("shift_factor") or 0.0),
        config=json.loads(vae.to_json_string()),
    )
    return header, dict(vae.state_dict())


def _transformer(pipeline: Path, vae: Header) -> tuple[Header, dict[str, Tensor]]:
    index, folder = read_object(pipeline / "model_index.json"), pipeline / "transformer"
    name = (index.get("transformer") or [None, None])[1]
    if name != SD3Transformer2DModel.__name__:
        raise DavaeError(
            f"{pipeline} has a {name}: the nodes for ComfyUI know the transformer of Stable Diffusion 3 alone. The "
            "autoencoder can be exported without it: davae export with the folder vae/ of the pipeline"
        )
    config, scheduler = (read_object(f) for f in (folder / "config.json", pipeline / "scheduler/scheduler_config.json"))
    heads, blocks = config["num_attention_heads"], config["num_layers"]
    if config["attention_head_dim"] != 64 or heads != blocks:
        raise DavaeError(
            f"{folder} has {blocks} blocks of {heads} heads with {config['attention_head_dim']} channels: ComfyUI's "
            "model of Stable Diffusion 3 has as many heads as blocks, of 64 channels, and cannot hold it"
        )
    if scheduler.get("use_dynamic_shifting") or "shift" not in scheduler:
        raise DavaeError(
            f"{pipeline} takes its timestep shift from the image's size, and ComfyUI's model of Stable Diffusion 3 has "
            "one for all sizes: upgrade with --timestep-shift NUMBER"
        )
    variant = chosen_variant(folder, component_files([folder]), None)
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(stored_keys(folder, variant).values())):
        tensors |= read_finite(file)
    header = Header(**asdict(vae) | {"kind": "transformer", "config": config, "scheduler": scheduler})
    with init_empty_weights(include_buffers=False), about_file(folder):
        check_keys(tensors, SD3Transformer2DModel.from_config(config).state_dict(), "the transformer")
    return header, tensors


def _adapters(folder: Path, autoencoder: Path) -> tuple[Header, dict[str, Tensor]]:
    vae = _autoencoder(autoencoder)[0]
    files = {name: folder / name for name in (LAYERS_FILE, LORA_FILE) if (folder / name).is_file()}
    metadata = {name: _metadata(file) for name, file in files.items()}
    said = plain_json(metadata[LAYERS_FILE][_METADATA])
    if said["transformer"] != SD3Transformer2DModel.__name__:
        raise DavaeError(
            f"{folder} belongs to a {said['transformer']}: the nodes for ComfyUI know that of Stable Diffusion 3 alone"
        )
    if said["scheduler"].get("use_dynamic_shifting"):
        raise DavaeError(
            f"{folder} takes its timestep shift from the image's size, which ComfyUI does not: train with one"
        )
    tensors = {f"{_LAYER}{key}": value for key, value in read_finite(files[LAYERS_FILE]).items()}
    if LORA_FILE in files:
        lora = read_finite(files[LORA_FILE])
        tensors |= lora
        with about_file(files[LORA_FILE]):
            tensors |= dict(_alphas(lora, plain_json(metadata[LORA_FILE][LORA_ADAPTER_METADATA_KEY])))
    header = Header(**asdict(vae) | {"kind": "adapters", "config": metadata, "scheduler": said["scheduler"]})
    return header, tensors


def _alphas(lora: Mapping[str, Tensor], said: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """``.alpha`` of each layer, with which ComfyUI scales by ``alpha / rank``."""
    config = LoraConfig(**{key.removeprefix("transformer."): value for key, value in said.items()})
    odd = [key for key in lora if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd:
        raise DavaeError(f"'{odd[0]}' is no matrix of a plain LoRA: merge it, and export the pipeline instead")
    for key in lora:
        if key.endswith(".lora_A.weight"):
            layer = key.removesuffix(".lora_A.weight")
            patterns = config.alpha_pattern
            plain = layer.removeprefix("transformer.")
            alpha = float(patterns.get(get_pattern_key(patterns, plain), config.lora_alpha))
            yield f"{layer}.alpha", torch.tensor(alpha * len(lora[key]) ** 0.5 if config.use_rslora else alpha)


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


# ---------------------------------------------------------------------- from ComfyUI


def read_header(file: str | Path, *kinds: Kind) -> Header:
    """The metadata of a file, without its tensors.

    Args:
        file: written by :func:`write_single_files`.
        kinds: those accepted; none accepts all.

    Raises:
        DavaeError: it is not such a file, of a later format, or of another kind.
    """
    file = Path(file)
    if not file.is_file():
        raise DavaeError(f"there is no file {file}")
    with about_file(file):
        try:
            said = plain_json(_metadata(file)[_METADATA])
            header = Header(**said)
        except SafetensorError as error:
            raise DavaeError("this is no whole safetensors file: copy it again") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DavaeError(
                "it was not written by 'davae export --format comfyui', or has lost its metadata: export it again"
            ) from error
        if header.format != FORMAT:
            raise DavaeError(f"it has format {header.format}, this davae reads {FORMAT}: update davae")
        if kinds and header.kind not in kinds:
            raise DavaeError(f"it holds {_WORDS[header.kind]}: expected {' or '.join(_WORDS[kind] for kind in kinds)}")
    return header


_WORDS: dict[Kind, str] = {"transformer": "a transformer", "autoencoder": "an autoencoder", "adapters": "a LoRA"}


def load_model(file: str | Path) -> AutoencoderDA | SD3Transformer2DModel:
    """The autoencoder or transformer of a file, in eval mode and the file's dtype.

    Raises:
        DavaeError: as :func:`read_header`, or a tensor is missing, unexpected, of another shape or not finite.
    """
    header = read_header(file, "autoencoder", "transformer")
    kind: Any = AutoencoderDA if header.kind == "autoencoder" else SD3Transformer2DModel
    with init_empty_weights(include_buffers=False):
        model: AutoencoderDA | SD3Transformer2DModel = kind.from_config(header.config)
    with about_file(file):
        tensors = read_finite(file)
        check_keys(tensors, model.state_dict(), f"the {kind.__name__}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def split_adapters(file: str | Path) -> tuple[Header, dict[str, Tensor], dict[str, Tensor]]:
    """Header, LoRA with its alphas, and widened layers by the parameter's name in the diffusers model.

    Raises:
        DavaeError: as :func:`read_header`.
    """
    header, tensors = read_header(file, "adapters"), read_finite(file)
    prefix = f"{_LAYER}transformer."
    layers = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return header, {key: value for key, value in tensors.items() if not key.startswith(_LAYER)}, layers


def write_adapters(file: Path, folder: Path) -> None:
    """Write the two files that :func:`davae.load_adapters` reads, equal to those that were exported.

    Raises:
        DavaeError: as :func:`read_header`.
    """
    header, lora, _ = split_adapters(file)
    own = {key.removeprefix(_LAYER): value for key, value in read_finite(file).items() if key.startswith(_LAYER)}
    atomic_tensors(folder / LAYERS_FILE, own, metadata=header.config[LAYERS_FILE])
    if LORA_FILE in header.config:
        plain = {key: value for key, value in lora.items() if not key.endswith(".alpha")}
        atomic_tensors(folder / LORA_FILE, plain, metadata=header.config[LORA_FILE])
