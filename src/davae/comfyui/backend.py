"""davae's models as the objects that ComfyUI passes from node to node."""

import copy
import logging
from pathlib import Path
from typing import Any

import comfy.latent_formats
import comfy.lora
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import latent_preview
import torch

from davae.comfyui.latents import Coder
from davae.errors import DavaeError
from davae.interop.comfyui import WIDENED, Header, load_model, read_header, split_adapters


class StructuredFormat(comfy.latent_formats.LatentFormat):
    """Base and detail channels with one shift and scale; previews show the base channels."""

    def __init__(self, channels: int, base: int, scaling: float | None = None, shift: float | None = None) -> None:
        sd3 = comfy.latent_formats.SD3()
        self.latent_channels = channels
        self.scale_factor = sd3.scale_factor if scaling is None else scaling
        self.shift_factor = sd3.shift_factor if shift is None else shift
        self.base = sd3 if base == sd3.latent_channels else comfy.latent_formats.LatentFormat()

    @classmethod
    def of(cls, header: Header) -> "StructuredFormat":
        """The format that a file states."""
        return cls(header.channels, header.base_channels, header.scaling_factor, header.shift_factor)

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        """To model space."""
        return (latent - self.shift_factor) * self.scale_factor

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        """From model space."""
        return latent / self.scale_factor + self.shift_factor


class WidenedSD3(comfy.supported_models.SD3):
    """Stable Diffusion 3 with more channels, so that ComfyUI's own loader takes it too."""

    @classmethod
    def matches(cls, unet_config: dict[str, Any], state_dict: Any = None) -> bool:
        """Whether this is an MMDiT with more channels than the published ones."""
        least = comfy.supported_models.SD3.unet_config["in_channels"]
        wider = unet_config.get("in_channels") or 0
        return wider > least and super().matches({**unet_config, "in_channels": least}, state_dict)

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        least = comfy.supported_models.SD3.unet_config["in_channels"]
        self.latent_format = StructuredFormat(unet_config["in_channels"], least)


class BasePreviewer(latent_preview.LatentPreviewer):
    """A previewer of the base that is given wider latents."""

    def __init__(self, previewer: Any, channels: int) -> None:
        self.previewer, self.channels = previewer, channels

    def decode_latent_to_preview(self, x0: torch.Tensor) -> Any:
        """A picture of the base channels."""
        return self.previewer.decode_latent_to_preview(x0[:, : self.channels])


def register() -> None:
    """Let ComfyUI know the widened model, and preview the base channels of structured latents; once."""
    if any(known.__name__ == WidenedSD3.__name__ for known in comfy.supported_models.models):
        return
    comfy.supported_models.models.append(WidenedSD3)
    made_before = latent_preview.get_previewer

    def get_previewer(device: Any, latent_format: Any) -> Any:
        base = getattr(latent_format, "base", latent_format)
        previewer = made_before(device, base)
        if previewer is None or not isinstance(latent_format, StructuredFormat | comfy.latent_formats.SD3):
            return previewer
        return BasePreviewer(previewer, base.latent_channels)

    latent_preview.get_previewer = get_previewer


class StructuredVAE(comfy.sd.VAE):
    """ComfyUI's ``VAE`` around an ``AutoencoderDA``: its own nodes for encoding and decoding take it, too."""

    memory_used_decode: Any

    def __init__(self, model: Any) -> None:
        level = logging.root.manager.disable
        logging.disable(logging.WARNING)  # it would warn that there are no weights
        try:
            super().__init__(sd={})
        finally:
            logging.disable(level)
        pixels = model.spatial_compression**2
        self.first_stage_model = Coder(model).eval()
        self.latent_channels = model.layout.channels
        self.downscale_ratio = self.upscale_ratio = model.spatial_compression
        decode = self.memory_used_decode
        self.memory_used_decode = lambda shape, dtype: decode(shape, dtype) * pixels / 64  # ComfyUI counts 8 x 8
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = comfy.model_management.intermediate_device()
        self.first_stage_model.to(self.vae_dtype)
        offload = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.ModelPatcher(self.first_stage_model, self.device, offload)


def load_autoencoder(file: str | Path) -> StructuredVAE:
    """The autoencoder of a file as a ``VAE``."""
    read_header(file, "autoencoder")
    return StructuredVAE(load_model(file))


def structured(vae: Any) -> Any:
    """The ``VAE``'s :class:`~.latents.Coder`.

    Raises:
        DavaeError: it is another autoencoder.
    """
    coder = getattr(vae, "first_stage_model", None)
    if not isinstance(coder, Coder):
        raise DavaeError("this VAE has no details: load one with 'DA-VAE Load Autoencoder'")
    return coder


def load_transformer(file: str | Path) -> Any:
    """The widened transformer of a file as a ``MODEL``, with the pipeline's timestep shift."""
    header = read_header(file, "transformer")
    model = comfy.sd.load_diffusion_model_state_dict(comfy.utils.load_torch_file(str(file)))
    if model is None:
        raise DavaeError(f"{file}: this ComfyUI does not recognise its transformer: update ComfyUI")
    model.model.latent_format = StructuredFormat.of(header)
    model.model.model_sampling.set_parameters(shift=header.shift)
    return model


def add_lora(model: Any, file: str | Path, strength: float) -> Any:
    """The base's ``MODEL`` with the widened layers of a file and its LoRA, at that strength.

    ComfyUI pads the layers to their new shapes, as for a LoRA with ``reshape_weight``; they are replaced in full,
    biases too, whatever the strength. ``model`` is not changed.

    Raises:
        DavaeError: a model of another class or width, or a layer of the LoRA that it lacks.
    """
    header, lora, layers = split_adapters(file)
    if not isinstance(model.model, comfy.model_base.SD3):
        raise DavaeError(f"{file} belongs to Stable Diffusion 3, the model is a {type(model.model).__name__}")
    state = model.model.state_dict()
    for name, value in layers.items():
        found = tuple(state[f"diffusion_model.{WIDENED[name]}"].shape)
        wanted = list(value.shape)
        if name == "pos_embed.proj.weight":
            wanted[1] = header.base_channels
        elif name.startswith("proj_out"):
            wanted[0] = wanted[0] // header.channels * header.base_channels
        if found != tuple(wanted):
            raise DavaeError(
                f"{file} belongs to another base: '{WIDENED[name]}' is {found} in the model, not {tuple(wanted)}"
            )
    known = comfy.lora.model_lora_keys_unet(model.model, {})
    unknown = sorted({key.rsplit(".lora_A", 1)[0] for key in lora if ".lora_A" in key} - known.keys())
    if unknown:
        raise DavaeError(f"{file}: the model has no layer '{unknown[0]}' ({len(unknown)} such)")
    made, _ = comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)
    whole = {
        f"diffusion_model.{WIDENED[name]}": ("diff", (value, {"pad_weight": True})) for name, value in layers.items()
    }
    made.add_patches(whole, 1.0, 0.0)
    sampling = copy.deepcopy(model.get_model_object("model_sampling"))
    sampling.set_parameters(shift=header.shift)
    made.add_object_patch("model_sampling", sampling)
    made.add_object_patch("latent_format", StructuredFormat.of(header))
    made.add_object_patch("diffusion_model.out_channels", header.channels)
    return made
