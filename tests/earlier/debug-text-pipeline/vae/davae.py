# Copyright the davae authors. Licensed under the Apache License, Version 2.0:
# http://www.apache.org/licenses/LICENSE-2.0
#
# Made by davae 0.1.0 from its own sources; needs torch and diffusers. With davae installed, `import davae` takes
# the place of this file.
"""AutoencoderDA of davae, to be loaded with ``trust_remote_code=True``."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path

_THIS_FILE = Path(__file__).read_text(encoding="utf-8")


def custom_code(name: str) -> str:
    """This file, to be saved again with the model."""
    return _THIS_FILE


# ----------------------------------------------------------------------------------------------------------------
# davae.errors: Errors that speak to the person who runs davae.

class DavaeError(ValueError):
    """A mistake in what was asked: the message says what is wrong, where, and how to mend it."""


# ----------------------------------------------------------------------------------------------------------------
# davae.latents.layout: Where base and detail channels sit in a structured latent, and how many tokens it makes.

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentLayout:
    """The structured latent ``[z, z_d]``: ``C`` base channels first, ``D`` detail channels after.

    This is the one place that defines the order.

    Args:
        base_channels: ``C``, channels of the base VAE's latent, at least 1.
        detail_channels: ``D``, channels of the detail latent; 0 for a base model, whose latent is ``z``
            alone.

    Raises:
        DavaeError: a count is too small.
    """

    base_channels: int
    detail_channels: int

    def __post_init__(self) -> None:
        for name, least in (("base_channels", 1), ("detail_channels", 0)):
            if getattr(self, name) < least:
                raise DavaeError(f"{name} must be at least {least}, not {getattr(self, name)}")

    @property
    def channels(self) -> int:
        """``C + D``."""
        return self.base_channels + self.detail_channels

    @property
    def base(self) -> slice:
        """Channels of the base latent."""
        return slice(0, self.base_channels)

    @property
    def detail(self) -> slice:
        """Channels of the detail latent."""
        return slice(self.base_channels, self.channels)

    @property
    def group_size(self) -> int:
        """``r = D / C``: how many consecutive detail channels belong to one base channel.

        Raises:
            DavaeError: ``D`` is not a multiple of ``C``.
        """
        if self.detail_channels % self.base_channels:
            raise DavaeError(
                f"{self.detail_channels} detail channels do not divide into {self.base_channels} equal groups"
            )
        return self.detail_channels // self.base_channels

    def split(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, C + D, h, w]`` to base ``[B, C, h, w]`` and detail ``[B, D, h, w]``.

        Raises:
            DavaeError: the latent has another number of channels.
        """
        if latent.shape[1] != self.channels:
            raise DavaeError(
                f"the latent has {latent.shape[1]} channels, expected {self.channels} "
                f"({self.base_channels} base + {self.detail_channels} detail)"
            )
        return latent[:, self.base], latent[:, self.detail]

    def join(self, z: Tensor, z_d: Tensor) -> Tensor:
        """Base ``[B, C, h, w]`` and detail ``[B, D, h, w]`` to ``[B, C + D, h, w]``.

        Raises:
            DavaeError: a part has another number of channels, or the parts differ in batch or grid.
        """
        for name, part, expected in (
            ("base", z, self.base_channels),
            ("detail", z_d, self.detail_channels),
        ):
            if part.shape[1] != expected:
                raise DavaeError(f"the {name} latent has {part.shape[1]} channels, expected {expected}")
        if z.shape[0] != z_d.shape[0] or z.shape[2:] != z_d.shape[2:]:
            raise DavaeError(
                f"base latent {tuple(z.shape)} and detail latent {tuple(z_d.shape)} differ in batch or grid"
            )
        return torch.cat([z, z_d], dim=1)


def token_count(height: int, width: int, *, spatial_compression: int, patch_size: int = 1) -> int:
    """Tokens that a transformer sees for an image of ``height`` by ``width`` pixels.

    Args:
        height, width: image size in pixels.
        spatial_compression: pixels per latent cell and side (``f``, or ``s * f`` when upgraded).
        patch_size: latent cells per token and side.

    Raises:
        DavaeError: a side is not a multiple of ``spatial_compression * patch_size``.
    """
    side = spatial_compression * patch_size
    if height % side or width % side:
        raise DavaeError(
            f"{height} x {width} pixels do not divide into tokens of {side} x {side} "
            f"(compression {spatial_compression} times patch {patch_size}): use multiples of {side}"
        )
    return (height // side) * (width // side)


# ----------------------------------------------------------------------------------------------------------------
# davae.models.base_adapters: What davae must know about a base: where its encoder's last and its decoder's first features are.

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.func import functional_call


_PROBE_SIDE = 256  # pixels; shows any compression up to 256, and costs nothing on the meta device


@dataclass(frozen=True)
class Convolution:
    """A 3x3 convolution as numbers: ``weight`` ``[out, in, 3, 3]`` and ``bias`` ``[out]``."""

    weight: Tensor
    bias: Tensor

    def plus_centre(self, matrix: Tensor) -> Convolution:
        """The same plus a 1x1 convolution with ``matrix`` ``[out, in]``."""
        weight = self.weight.clone()
        weight[:, :, 1, 1] += matrix.to(weight)
        return Convolution(weight, self.bias)

    def then(self, matrix: Tensor, offset: Tensor) -> Convolution:
        """Followed by ``y -> matrix y + offset``. Exact."""
        weight = torch.einsum("oi,ichw->ochw", matrix, self.weight)
        return Convolution(weight, matrix @ self.bias + offset)

    def after(self, matrix: Tensor, offset: Tensor) -> Convolution:
        """Preceded by ``x -> matrix x + offset``.

        Exact except in the outermost ring, where zero padding takes the place of the offset.
        """
        bias = self.bias + torch.einsum("oihw,i->o", self.weight, offset)
        return Convolution(torch.einsum("oihw,ic->ochw", self.weight, matrix), bias)


class BaseAdapter(ABC):
    """Knowledge of one autoencoder class: two methods must be written, the rest has defaults."""

    @abstractmethod
    def detail_encoder(self, base: Any) -> nn.Module:
        """A copy of the encoder that stops at its last features.

        It maps images ``[B, 3, H, W]`` to ``[B, F, H / f, W / f]``.

        The layers after those features must not be in it, or they would stand in the state dict unused.
        """

    @abstractmethod
    def joint_decoder(self, base: Any) -> nn.Module:
        """A copy of the decoder that begins at its first features.

        It maps ``[B, F, h, w]`` to images ``[B, 3, f h, f w]``.
        """

    def encode(self, base: Any, images: Tensor) -> Tensor:
        """The base latent: the posterior's mean, or the latent itself of a base without posterior."""
        output = base.encode(images)
        for name in ("latent_dist", "latents", "latent"):
            if hasattr(output, name):
                latent = getattr(output, name)
                return latent.mode() if name == "latent_dist" else latent
        raise DavaeError(
            f"{type(base).__name__}.encode returns neither latent_dist, latents nor latent: "
            f"override {type(self).__name__}.encode"
        )

    def decode(self, base: Any, z: Tensor) -> Tensor:
        """Images from raw base latents."""
        return base.decode(z).sample

    def latent_channels(self, base: Any) -> int:
        """``C``."""
        return int(base.config.latent_channels)

    def latent_layout(self, base: Any) -> LatentLayout:
        """Its base and detail channels: none of the latter but in a base that has levels itself."""
        return LatentLayout(self.latent_channels(base), 0)

    def scale(self, base: Any) -> int:
        """Resolution of its images per side, as a multiple of the pretrained VAE's: 1 but with levels."""
        return 1

    def network_adapter(self, base: Any) -> BaseAdapter:
        """The adapter that knows the networks: this one but with levels."""
        return self

    def drop_decoder(self, base: Any) -> None:
        """Take the decoder out of the base."""
        base.decoder = base.post_quant_conv = None

    def probe_encoder(self, detail_encoder: nn.Module) -> tuple[int, int]:
        """Feature channels ``F`` and compression ``f`` of the detail encoder, found without computing."""
        tensors = {**dict(detail_encoder.named_parameters()), **dict(detail_encoder.named_buffers())}
        dtype = next(detail_encoder.parameters()).dtype
        images = torch.empty(1, 3, _PROBE_SIDE, _PROBE_SIDE, device="meta", dtype=dtype)
        with torch.no_grad():
            weights = {name: tensor.to("meta") for name, tensor in tensors.items()}
            features = functional_call(detail_encoder, weights, (images,))
        return features.shape[1], _PROBE_SIDE // features.shape[-1]

    def decoder_channels(self, joint_decoder: nn.Module) -> int:
        """Feature channels that the joint decoder takes: those of its first layer that has weights."""
        for module in joint_decoder.modules():
            for name in ("in_channels", "num_channels", "in_features"):
                if (
                    isinstance(getattr(module, name, None), int)
                    and next(module.parameters(), None) is not None
                ):
                    return int(getattr(module, name))
        raise DavaeError(
            "cannot find how many channels the joint decoder takes: "
            f"override {type(self).__name__}.decoder_channels"
        )

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """``shift`` and ``scale``, float32 ``[C]``: diffusion models see ``(z - shift) * scale``.

        On any device: who uses them brings them to the latent's. The base's own device does not tell where it
        computes while its weights are offloaded.
        """
        config, channels = base.config, self.latent_channels(base)
        scale = torch.full((channels,), _number(config, "scaling_factor", 1.0))
        shift = torch.full((channels,), _number(config, "shift_factor", 0.0))
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shift = torch.tensor(mean, dtype=torch.float32).flatten()
            scale = scale / torch.tensor(std, dtype=torch.float32).flatten()
        return shift, scale

    def bound(self, z: Tensor) -> Tensor:
        """What the base's decoder does to a raw latent before its first layer, such as a soft clamp."""
        return z

    def encoder_head(self, base: Any) -> Convolution | None:
        """Last features to raw latent mean as one 3x3 convolution; None where that is not possible."""
        return None

    def decoder_stem(self, base: Any) -> Convolution | None:
        """Raw (bounded) latent to first features as one 3x3 convolution; None where that is not possible."""
        return None

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """Further config entries that pipelines of this base read."""
        return {}

    def pipeline_modules(self, base: Any, detail_channels: int) -> dict[str, nn.Module]:
        """Further modules that pipelines of this base read."""
        return {}


class FeatureChain(nn.Module):
    """Copies of stages, one after another, with gradient checkpointing for each."""

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(copy.deepcopy(stage) for stage in stages)
        self.gradient_checkpointing = False  # diffusers sets both
        self._gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Through all stages."""
        for stage in self.stages:
            if self._gradient_checkpointing_func and self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(stage, x)
            else:
                x = stage(x)
        return x


_ADAPTERS: dict[str, tuple[type[ModelMixin], BaseAdapter]] = {}


def register_adapter(base_class: type[ModelMixin], adapter: BaseAdapter) -> None:
    """Make ``base_class`` usable as a base. Call it on import, before models with that base are loaded.

    Args:
        base_class: a diffusers image autoencoder, 3 channels in and out.
        adapter: its description.
    """
    _ADAPTERS[base_class.__name__] = (base_class, adapter)


def find_adapter(name: str) -> tuple[type[ModelMixin], BaseAdapter]:
    """Class and adapter of a base by its class name.

    Raises:
        DavaeError: no adapter is registered; the message says what to write.
    """
    if name not in _ADAPTERS:
        raise DavaeError(
            f"{name} is not a base that davae knows ({', '.join(_ADAPTERS)}). To use it, subclass "
            "davae.models.BaseAdapter, write its methods detail_encoder(base) (a copy of the encoder that "
            "stops at its last features) and joint_decoder(base) (a copy of the decoder that begins at its "
            "first features), "
            f"and call davae.models.register_adapter({name}, adapter) before making or loading the model"
        )
    return _ADAPTERS[name]


def constructor_arguments(base_class: type[ModelMixin], config: Any) -> dict[str, Any]:
    """The part of a model's config that its constructor takes."""
    taken = inspect.signature(base_class.__init__).parameters
    return {key: value for key, value in config.items() if key in taken}


def offloaded_blocks(base: ModelMixin) -> list[str]:
    """Names of the base's parts that group offloading brings to the device one by one.

    A group's weights follow the ``forward`` of its module, and a base is used through ``encode`` and ``decode``:
    its parts must be groups of their own. Where its class does not name them, it is all of them.
    """
    named = getattr(base, "_group_offload_block_modules", None)
    return list(named or [name for name, _ in base.named_children()])


def _number(config: Any, name: str, default: float) -> float:
    value = config.get(name)
    return default if value is None else float(value)


# ----------------------------------------------------------------------------------------------------------------
# davae.models.frugal_blocks: Residual blocks that keep less at a time while gradients are off.

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn


class FrugalSiLU(nn.SiLU):
    """``x sigmoid(x)``, in place while gradients are off. For inputs that nobody reads afterwards."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return F.silu(input, inplace=not torch.is_grad_enabled())


class FrugalResnetBlock2D(ResnetBlock2D):
    """A residual block of a KL autoencoder: no time, no change of resolution."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """``[B, in, h, w]`` to ``[B, out, h, w]``."""
        if torch.is_grad_enabled() or temb is not None:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x = self.conv1(F.silu(self.norm1(input_tensor), inplace=True))  # [B, out, h, w]
        x = F.silu(self.norm2(x), inplace=True)
        x = self.conv2(self.dropout(x))
        x += input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        return x if self.output_scale_factor == 1.0 else x.div_(self.output_scale_factor)


def with_frugal_blocks(network: nn.Module) -> nn.Module:
    """Let diffusers' ``Encoder`` or ``Decoder`` use these blocks; changed in place and returned."""
    for module in network.modules():
        if _is_plain_block(module):
            module.__class__ = FrugalResnetBlock2D
    if type(getattr(network, "conv_act", None)) is nn.SiLU:  # after a norm, whose output nobody else reads
        network.conv_act = FrugalSiLU()
    return network


def _is_plain_block(module: nn.Module) -> bool:
    return (
        type(module) is ResnetBlock2D
        and module.time_emb_proj is None
        and module.upsample is None
        and module.downsample is None
        and type(module.nonlinearity) is nn.SiLU
        and isinstance(module.norm1, nn.GroupNorm)
        and isinstance(module.norm2, nn.GroupNorm)
    )


# ----------------------------------------------------------------------------------------------------------------
# davae.models.ldm_autoencoder: ``AutoencoderKL`` whose first convolution has its own width, as LDM's encoder allows.

from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.resnet import ResnetBlock2D
from torch import nn


class LDMAutoencoderKL(AutoencoderKL):
    """An ``AutoencoderKL`` with ``stem_channels`` behind the encoder's first convolution.

    LDM (``ch``, ``ch_mult``) starts with ``ch`` channels and widens in the first residual block;
    ``AutoencoderKL`` starts with the width of its first level. The two agree where ``ch_mult`` begins with 1.

    Args:
        stem_channels: ``ch``.

    The other arguments are ``AutoencoderKL``'s.
    """

    @register_to_config
    def __init__(
        self,
        stem_channels: int,
        down_block_types: tuple[str, ...],
        up_block_types: tuple[str, ...],
        block_out_channels: tuple[int, ...],
        layers_per_block: int = 2,
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 256,
        scaling_factor: float = 1.0,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = False,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        super().__init__(
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.encoder.conv_in = nn.Conv2d(3, stem_channels, kernel_size=3, padding=1)
        self.encoder.down_blocks[0].resnets[0] = ResnetBlock2D(
            in_channels=stem_channels,
            out_channels=block_out_channels[0],
            temb_channels=None,
            groups=norm_num_groups,
            eps=1e-6,
        )


# ----------------------------------------------------------------------------------------------------------------
# davae.models.known_bases: Adapters of the base autoencoders that work out of the box.

import copy
import math
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderTiny
from torch import Tensor, nn


class _Rescale(nn.Module):
    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class _OverChannels(nn.Module):
    """Applies a norm of the last dimension to the channels."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class KLAdapter(BaseAdapter):
    """``AutoencoderKL``: SD, SDXL, SD3, FLUX, VA-VAE; with and without quant convolutions."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without ``conv_out``: after its norm and activation."""
        encoder = copy.deepcopy(base.encoder)
        encoder.conv_out = nn.Identity()
        return with_frugal_blocks(encoder)

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in``."""
        decoder = copy.deepcopy(base.decoder)
        decoder.conv_in = nn.Identity()
        return with_frugal_blocks(decoder)

    def encoder_head(self, base: Any) -> Convolution | None:
        """``conv_out`` and the quant convolution, the mean's half."""
        head = _numbers(base.encoder.conv_out)
        if base.quant_conv is not None:
            head = head.then(*_matrix(base.quant_conv))
        channels = self.latent_channels(base)
        return Convolution(head.weight[:channels], head.bias[:channels])

    def decoder_stem(self, base: Any) -> Convolution | None:
        """``conv_in`` after the post-quant convolution."""
        stem = _numbers(base.decoder.conv_in)
        return stem if base.post_quant_conv is None else stem.after(*_matrix(base.post_quant_conv))


class Flux2Adapter(KLAdapter):
    """``AutoencoderKLFlux2``: ``AutoencoderKL`` whose pipelines normalise patches with its batch norm."""

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """From the batch norm's statistics, averaged over the positions in a patch."""
        cells = math.prod(base.config.patch_size)
        mean = base.bn.running_mean.float().unflatten(0, (-1, cells))  # [C, p^2]: channel-major
        variance = base.bn.running_var.float().unflatten(0, (-1, cells))
        return mean.mean(dim=1), (variance.mean(dim=1) + base.config.batch_norm_eps).rsqrt()

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """What the batch norm needs."""
        return {"batch_norm_eps": base.config.batch_norm_eps, "patch_size": list(base.config.patch_size)}

    def pipeline_modules(self, base: Any, detail_channels: int) -> dict[str, nn.Module]:
        """The batch norm, extended by entries that leave the (already normalised) details as they are."""
        eps, cells = base.config.batch_norm_eps, math.prod(base.config.patch_size)
        details = torch.zeros(detail_channels * cells)
        norm = nn.BatchNorm2d(len(base.bn.running_mean) + len(details), eps=eps, affine=False)
        norm.running_mean = torch.cat([base.bn.running_mean, details.to(base.bn.running_mean)])
        norm.running_var = torch.cat([base.bn.running_var, (details + 1.0 - eps).to(base.bn.running_var)])
        return {"bn": norm}


class DCAdapter(BaseAdapter):
    """``AutoencoderDC`` (SANA): deterministic latent, shortcuts around the layers at both latent ends."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without ``conv_out`` and its shortcut."""
        return FeatureChain([base.encoder.conv_in, *base.encoder.down_blocks])

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in`` and its shortcut."""
        decoder = base.decoder
        end = [_OverChannels(decoder.norm_out), decoder.conv_act, decoder.conv_out]
        return FeatureChain([*reversed(decoder.up_blocks), *end])

    def encoder_head(self, base: Any) -> Convolution | None:
        """``conv_out`` and the shortcut that averages consecutive features."""
        head = _numbers(base.encoder.conv_out)
        if base.encoder.out_shortcut:
            out, features = head.weight.shape[:2]
            head = head.plus_centre(_runs(out, features).T * (out / features))
        return head

    def decoder_stem(self, base: Any) -> Convolution | None:
        """``conv_in`` and the shortcut that repeats channels in a row."""
        stem = _numbers(base.decoder.conv_in)
        if base.decoder.in_shortcut:
            features, channels = stem.weight.shape[:2]
            stem = stem.plus_centre(_runs(channels, features))
        return stem

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """SANA pipelines count ``encoder_block_out_channels``."""
        return {"encoder_block_out_channels": list(base.config.encoder_block_out_channels)}


class TinyAdapter(BaseAdapter):
    """``AutoencoderTiny`` (TAESD): deterministic latent, softly clamped to (-3, 3); [0, 1] inside."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without its last convolution."""
        return FeatureChain([_Rescale(0.5, 0.5), *base.encoder.layers[:-1]])

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without its first convolution and without the clamp of the latent."""
        return FeatureChain([*base.decoder.layers[1:], _Rescale(2.0, -1.0)])

    def bound(self, z: Tensor) -> Tensor:
        """``3 tanh(z / 3)``."""
        return torch.tanh(z / 3) * 3

    def encoder_head(self, base: Any) -> Convolution | None:
        """The encoder's last convolution."""
        return _numbers(base.encoder.layers[-1])

    def decoder_stem(self, base: Any) -> Convolution | None:
        """The decoder's first convolution."""
        return _numbers(base.decoder.layers[0])


def _numbers(conv: nn.Conv2d) -> Convolution:
    bias = conv.bias if conv.bias is not None else conv.weight.new_zeros(conv.out_channels)
    return Convolution(conv.weight.detach().float(), bias.detach().float())


def _matrix(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution as matrix ``[out, in]`` and offset ``[out]``."""
    numbers = _numbers(conv)
    return numbers.weight[:, :, 0, 0], numbers.bias


def _runs(few: int, many: int) -> Tensor:
    """``[many, few]``: 1 where a row belongs to the run of ``many / few`` consecutive rows of that column."""
    return torch.eye(few).repeat_interleave(many // few, dim=0)


for _class, _adapter in (
    (AutoencoderKL, KLAdapter()),
    (LDMAutoencoderKL, KLAdapter()),
    (AutoencoderKLFlux2, Flux2Adapter()),
    (AutoencoderDC, DCAdapter()),
    (AutoencoderTiny, TinyAdapter()),
):
    register_adapter(_class, _adapter)


# ----------------------------------------------------------------------------------------------------------------
# davae.models.video_bases: Adapters of autoencoders that come from video models: Qwen-Image's, which sees an image as a video of one frame.

import copy
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLQwenImage21
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageResample
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import (
    QwenImage21CausalConv3d,
    QwenImage21Resample,
)
from torch import Tensor, nn


class FrameConv2d(nn.Conv2d):
    """What a causal convolution over time does to a single frame ``[B, C, 1, H, W]``."""

    def forward(self, x: Tensor, cache_x: None = None) -> Tensor:
        """``[B, C, 1, H, W]`` to ``[B, O, 1, H', W']``."""
        return super().forward(x.squeeze(2)).unsqueeze(2)


class FrameEncoder(nn.Module):
    """An encoder of single frames as one of images; what lacks to its input channels is opacity, 1."""

    def __init__(self, network: nn.Module, channels: int) -> None:
        super().__init__()
        self.network = network
        self.channels = channels

    def forward(self, images: Tensor) -> Tensor:
        """``[B, 3, H, W]`` to features ``[B, F, h, w]``."""
        opaque = self.channels - images.shape[1]
        if opaque:
            images = torch.cat([images, torch.ones_like(images[:, :opaque])], dim=1)
        return self.network(images.unsqueeze(2)).squeeze(2)


class FrameDecoder(nn.Module):
    """A decoder of single frames as one of images; of its output the three colours."""

    def __init__(self, network: nn.Module, **first: bool) -> None:
        super().__init__()
        self.network = network
        self.first = first  # what says that there is no frame before

    def forward(self, features: Tensor) -> Tensor:
        """``[B, F, h, w]`` to images ``[B, 3, H, W]``."""
        return self.network(features.unsqueeze(2), **self.first).squeeze(2)[:, :3]


class QwenImageAdapter(BaseAdapter):
    """``AutoencoderKLQwenImage``: f8, per-channel means and deviations of the latent in the config."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """The encoder without ``conv_out``: after its norm and activation."""
        _check_no_patches(base)
        encoder = _of_single_frames(base.encoder, without="conv_out")
        return FrameEncoder(encoder, encoder.conv_in.in_channels)

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in``."""
        return FrameDecoder(_of_single_frames(base.decoder, without="conv_in"))

    def encode(self, base: Any, images: Tensor) -> Tensor:
        """The posterior's mean, ``[B, C, h, w]``."""
        opaque = base.encoder.conv_in.in_channels - images.shape[1]
        if opaque:
            images = torch.cat([images, torch.ones_like(images[:, :opaque])], dim=1)
        return base.encode(images.unsqueeze(2)).latent_dist.mode().squeeze(2)

    def decode(self, base: Any, z: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]``; the base itself clamps them to [-1, 1]."""
        return base.decode(z.unsqueeze(2)).sample.squeeze(2)[:, :3]

    def latent_channels(self, base: Any) -> int:
        """``z_dim``."""
        return int(base.config.z_dim)

    def encoder_head(self, base: Any) -> Convolution | None:
        """``conv_out`` and the quant convolution, the mean's half."""
        quant = _on_one_frame(base.quant_conv)
        head = _on_one_frame(base.encoder.conv_out).then(quant.weight[:, :, 0, 0], quant.bias)
        channels = self.latent_channels(base)
        return Convolution(head.weight[:channels], head.bias[:channels])

    def decoder_stem(self, base: Any) -> Convolution | None:
        """``conv_in`` after the post-quant convolution."""
        post = _on_one_frame(base.post_quant_conv)
        return _on_one_frame(base.decoder.conv_in).after(post.weight[:, :, 0, 0], post.bias)


class QwenImage21Adapter(QwenImageAdapter):
    """``AutoencoderKLQwenImage21``: f16; with opacity as fourth channel, which the upgraded model leaves at 1."""

    def joint_decoder(self, base: Any) -> nn.Module:
        """The decoder without ``conv_in``; its shortcuts drop the frames before the first."""
        return FrameDecoder(_of_single_frames(base.decoder, without="conv_in"), first_chunk=True)


def _check_no_patches(base: Any) -> None:
    patch = base.config.get("patch_size")
    if patch not in (None, 1):
        raise DavaeError(
            f"{type(base).__name__} with patch_size {patch} is not supported: its networks see patches, not pixels"
        )


def _of_single_frames(network: nn.Module, *, without: str) -> Any:
    """A copy that computes the same for a single frame and has no weights for others."""
    network = copy.deepcopy(network)
    setattr(network, without, nn.Identity())
    for module in list(network.modules()):
        if isinstance(module, QwenImageResample | QwenImage21Resample) and module.mode.endswith("3d"):
            module.mode = module.mode.replace("3d", "2d")
            del module.time_conv
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            if isinstance(child, QwenImageCausalConv3d | QwenImage21CausalConv3d):
                setattr(parent, name, _frame_convolution(child))
    return network


def _frame_convolution(conv: Any) -> FrameConv2d:
    weight = conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight
    left, _, top, _ = conv._padding[:4]  # even in space, uneven in time alone
    frame = FrameConv2d(
        conv.in_channels,
        conv.out_channels,
        tuple(weight.shape[-2:]),
        stride=conv.stride[-2:],
        padding=(top, left),
        device=weight.device,
        dtype=weight.dtype,
    )
    frame.load_state_dict({"weight": weight, "bias": conv.bias})
    return frame


def _on_one_frame(conv: Any) -> Convolution:
    weight = conv.weight[:, :, -1] if conv.weight.ndim == 5 else conv.weight
    return Convolution(weight.detach().float(), conv.bias.detach().float())


register_adapter(AutoencoderKLQwenImage, QwenImageAdapter())
register_adapter(AutoencoderKLQwenImage21, QwenImage21Adapter())


# ----------------------------------------------------------------------------------------------------------------
# davae.models.detail_dropout: Dropout of whole detail latents, so that the joint decoder can also do without them.

from torch import Tensor


def detail_dropout_factor(uniform: Tensor, probability: float) -> Tensor:
    """Factor on each sample's detail latent: 0 with ``probability``, else ``1 / (1 - probability)``.

    Args:
        uniform: numbers in [0, 1), ``[B]``; a sample is kept where its number is below ``1 - probability``.
        probability: in [0, 1).
    """
    keep = 1.0 - probability
    return (uniform < keep).to(uniform.dtype) / keep


# ----------------------------------------------------------------------------------------------------------------
# davae.models.levels: The levels of a structured latent: ``[z, z_d1, z_d2, ...]``, where each prefix is an image of its own.

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """One prefix of the latent that can be decoded.

    Args:
        number: 0 is the base alone.
        scale: resolution of its image per side, as a multiple of the base's.
        layout: its channels: ``C`` base channels, and the detail channels of this and all lower levels.
    """

    number: int
    scale: int
    layout: LatentLayout


class OnABase:
    """What stands on a base: the base VAE, or the level below."""

    base: Any
    base_compression: int
    scale: int

    @property
    def below(self) -> Self | None:
        """The autoencoder of the level below; None where that is the base VAE."""
        return self.base if isinstance(self.base, OnABase) else None  # type: ignore[return-value]

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent position and side, ``s * f``."""
        return self.scale * self.base_compression


class Levels(OnABase):
    """What an :class:`davae.AutoencoderDA` tells about its levels.

    A level is an ``AutoencoderDA`` whose base is the level below; the lowest stands on the base VAE.
    """

    adapter: BaseAdapter
    layout: LatentLayout
    trains_below: bool
    config: Any

    @property
    def levels(self) -> tuple[Level, ...]:
        """Every prefix that can be decoded, the base (level 0) first, the whole latent last."""
        if self.below is None:
            lower: tuple[Level, ...] = (Level(0, 1, LatentLayout(self.layout.base_channels, 0)),)
        else:
            lower = self.below.levels
        return (*lower, Level(len(lower), self.scale, self.layout))

    @property
    def base_vae(self) -> Any:
        """The pretrained VAE at the bottom."""
        return self.base if self.below is None else self.below.base_vae

    def at_level(self, number: int) -> Self:
        """The autoencoder of a level, 1 or higher. It is a part of this one, not a copy.

        Raises:
            DavaeError: there is no such level.
        """
        for level in self.autoencoders():
            if level.levels[-1].number == number:
                return level
        raise DavaeError(f"there is no level {number} of details: levels are 1 to {self.levels[-1].number}")

    def autoencoders(self) -> Iterator[Self]:
        """The autoencoders of all levels, lowest first, this one last."""
        if self.below is not None:
            yield from self.below.autoencoders()
        yield self

    @apply_forward_hook
    def decode_level(self, latent: Tensor, level: int) -> Tensor:
        """The image of one level, ``[B, 3, h * f * scale, w * f * scale]`` with that level's scale.

        Channels above the level are not looked at.

        Args:
            latent: in the pipelines' convention, ``[B, n, h, w]`` with at least the level's channels.
            level: 0 decodes the base channels with the untouched base VAE, the last level everything.

        Raises:
            DavaeError: no such level, too few channels, or the model was made without the decoder.
        """
        levels = self.levels
        if not 0 <= level < len(levels):
            raise DavaeError(f"there is no level {level}: levels are 0 to {levels[-1].number}")
        channels = levels[level].layout.channels
        if latent.shape[1] < channels:
            raise DavaeError(f"level {level} needs {channels} channels, the latent has {latent.shape[1]}")
        latent = latent[:, :channels]
        if level == levels[-1].number:
            return self.decode(latent).sample  # type: ignore[attr-defined]
        if not self.config.has_base_decoder:
            raise DavaeError(
                "this autoencoder was made without its base's decoder: only its last level can be decoded"
            )
        if self.below is not None:
            return self.below.decode_level(latent, level)
        return self._decode_base(latent)  # type: ignore[attr-defined]

    @apply_forward_hook
    @torch.no_grad()
    def decode_base(self, latent: Tensor) -> Tensor:
        """A preview, ``[B, 3, H / s, W / s]``: the untouched base VAE on the first ``C`` channels.

        Args:
            latent: in the pipelines' convention, ``[B, C + D, h, w]``, or its base part ``[B, C, h, w]``.

        Raises:
            DavaeError: the model has no base decoder.
        """
        return self.decode_level(latent, 0)

    def drop_base_decoder(self) -> None:
        """Forget the decoders of all levels below: :meth:`decode` needs none of them.

        Saves their memory and their place in saved files; previews and lower levels cannot be decoded any more.
        """
        self.register_to_config(has_base_decoder=False)  # type: ignore[attr-defined]
        self.adapter.drop_decoder(self.base)

    def train_levels(self, *, together: bool) -> None:
        """Choose what learns: this level alone (the start), or all levels together. The base VAE never does.

        Raises:
            DavaeError: all are to learn, but the lower levels' decoders were dropped.
        """
        if self.below is not None:
            if together and not self.config.has_base_decoder:
                raise DavaeError("the lower levels have no decoders left: they cannot be trained")
            self.trains_below = together
            self.below.train_levels(together=together)
        self.requires_grad_(True)  # type: ignore[attr-defined]
        self.train(self.training)  # type: ignore[attr-defined]


# ----------------------------------------------------------------------------------------------------------------
# davae.models.detail_normalisation: The statistics of the detail channels, kept in the config, and the map between raw and pipeline latents.

from typing import Any

import torch
from torch import Tensor


class DetailNormalisation(OnABase):
    """Per-channel mean and standard deviation of ``z_d``, level by level.

    Every level keeps the statistics of its own channels in its own config. Networks see raw details; the
    statistics apply where pipelines hand latents in and out. They may thus be measured, and measured again, after
    a training, and a level means the same to the transformer whatever is added above it.
    """

    own_layout: LatentLayout
    config: Any

    def set_detail_statistics(self, mean: Tensor, std: Tensor, *, level: int | None = None) -> None:
        """Keep mean and standard deviation of raw ``z_d`` per channel; encode and decode normalise with them.

        They stand in the config.

        Args:
            mean, std: ``[D]``, of the channels that the level adds.
            level: which level, 1 the lowest; None is the last one.

        Raises:
            DavaeError: another length, a value that is not finite, or a standard deviation of 0.
        """
        if level is not None and level != self._number():
            if self.below is None:
                raise DavaeError(f"there is no level {level} of details: the lowest is {self._number()}")
            self.below.set_detail_statistics(mean, std, level=level)
            # The config of this level holds the one below, and is what a saved model is made from.
            arguments = constructor_arguments(type(self.below), self.below.config)
            self.register_to_config(base_config=arguments)  # type: ignore[attr-defined]
            return
        count = self.own_layout.detail_channels
        for name, values in (("mean", mean), ("std", std)):
            if values.shape != (count,) or not values.isfinite().all():
                raise DavaeError(
                    f"detail {name} must be {count} finite values, not {tuple(values.shape)}: {values}"
                )
        if not (std > 0).all():
            raise DavaeError(
                f"detail channel {int((std <= 0).nonzero()[0])} is constant: its standard deviation is 0"
            )
        self.register_to_config(detail_mean=mean.tolist(), detail_std=std.tolist())  # type: ignore[attr-defined]

    def detail_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw ``z_d``, float32 ``[D]`` each on the CPU, all levels."""
        count, config = self.own_layout.detail_channels, self.config
        mean = torch.tensor(config.detail_mean or [0.0] * count, dtype=torch.float32)
        std = torch.tensor(config.detail_std or [1.0] * count, dtype=torch.float32)
        if self.below is None:
            return mean, std
        mean_below, std_below = self.below.detail_statistics()
        return torch.cat([mean_below, mean]), torch.cat([std_below, std])

    def _detail_affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``mean`` and ``std``, ``[D, 1, 1]``, with ``z_d = x_d * std + mean`` for a pipeline's ``x_d``.

        Args:
            device: of ``x_d``; the model's own says nothing while its weights are offloaded.
        """
        mean, std = (values.to(device) for values in self.detail_statistics())
        scaling, shift = self.config.scaling_factor or 1.0, self.config.shift_factor or 0.0
        return (mean - shift * scaling * std)[:, None, None], (scaling * std)[:, None, None]

    def _number(self) -> int:
        return 1 if self.below is None else 1 + self.below._number()


# ----------------------------------------------------------------------------------------------------------------
# davae.latents.alignment: Detail alignment: the loss that ties the detail latent to the base latent, and its adaptive weight.

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


AlignmentForm = Literal["mean", "relational", "projection"]
_FLOAT16_SCALE = 4096.0
_FORMS = ("mean", "relational", "projection")


def _group_edges(channels: int, groups: int) -> list[int]:
    """Edges of ``groups`` runs of consecutive channels, ``round(k * channels / groups)``, halves to even.

    Rounding is done in float32 like the torch functions that published models were made with.
    """
    return [int(edge) for edge in torch.linspace(0, channels, groups + 1).round()]


def grouped_mean(z_d: Tensor, base_channels: int) -> Tensor:
    """Mean of ``z_d`` over groups of consecutive channels (Eq. 3), without weights.

    With ``D = r C``, base channel ``i`` gets the mean of detail channels ``i r ... i r + r - 1``. Where ``C``
    does not divide ``D`` the groups run between ``round(k D / C)``; an empty group gives zeros.

    Args:
        z_d: ``[B, D, h, w]``.
        base_channels: ``C``.

    Returns:
        ``[B, C, h, w]`` in the dtype of ``z_d``.
    """
    channels = z_d.shape[1]
    if channels == base_channels:
        return z_d
    if channels % base_channels == 0:
        return z_d.unflatten(1, (base_channels, channels // base_channels)).mean(dim=2)
    edges = _group_edges(channels, base_channels)
    groups = [
        z_d[:, start:end].mean(dim=1) if end > start else torch.zeros_like(z_d[:, 0])
        for start, end in pairwise(edges)
    ]
    return torch.stack(groups, dim=1)


def self_similarity(latent: Tensor) -> Tensor:
    """Cosine similarity of every grid position with every other, ``[B, C, h, w]`` to ``[B, h w, h w]``."""
    vectors = F.normalize(latent.flatten(2), dim=1)  # [B, C, hw]
    return vectors.transpose(1, 2) @ vectors


class AlignmentLoss(nn.Module):
    """How far the detail latent is from the base latent (Eq. 4), always computed in float32.

    * ``mean``: mean squared error between the grouped mean of ``z_d`` and ``z``. No weights. The paper's
      form.
    * ``relational``: mean squared error between the two matrices of cosine similarity among positions. It
      asks for the same neighbourhoods and leaves the channels free. Costs ``(h w)^2``.
    * ``projection``: mean squared error between a learned 1x1 convolution of ``z_d`` and ``z``. The
      convolution starts as the grouped mean.

    Args:
        layout: channel counts.
        form: one of the three above.

    Raises:
        DavaeError: an unknown form.
    """

    def __init__(self, layout: LatentLayout, form: AlignmentForm = "mean") -> None:
        super().__init__()
        if form not in _FORMS:
            raise DavaeError(f"unknown alignment form '{form}': use one of {', '.join(_FORMS)}")
        self.layout, self.form = layout, form
        self.projection: nn.Conv2d | None = None
        if form == "projection":
            self.projection = nn.Conv2d(layout.detail_channels, layout.base_channels, kernel_size=1)
            unit = torch.eye(layout.detail_channels)[:, :, None, None]  # each detail channel alone
            with torch.no_grad():
                self.projection.weight.copy_(grouped_mean(unit, layout.base_channels).transpose(0, 1))
                nn.init.zeros_(self.projection.bias)  # type: ignore[arg-type]

    def forward(self, z_d: Tensor, z: Tensor) -> Tensor:
        """Scalar loss of detail latent ``[B, D, h, w]`` against base latent ``[B, C, h, w]``.

        Raises:
            DavaeError: channel counts are not the layout's, or the grids differ.
        """
        self.layout.join(z, z_d)  # names what does not fit
        with torch.autocast(z.device.type, enabled=False):
            z_d, z = z_d.float(), z.float()
            if self.form == "relational":
                return F.mse_loss(self_similarity(z_d), self_similarity(z))
            if self.projection is not None:
                weight, bias = self.projection.weight.float(), self.projection.bias
                projected = F.conv2d(z_d, weight, None if bias is None else bias.float())
                return F.mse_loss(projected, z)
            return F.mse_loss(grouped_mean(z_d, self.layout.base_channels), z)


def adaptive_weight(
    reference_loss: Tensor,
    loss: Tensor,
    parameter: Tensor,
    *,
    maximum: float,
    among: Sequence[Tensor] | None = None,
) -> Tensor:
    """Weight that gives ``loss`` as large a gradient as ``reference_loss`` has, at one parameter.

    ``|d reference / d parameter| / (|d loss / d parameter| + 1e-4)``, clamped to ``[0, maximum]``, with
    Euclidean norms. The graph is kept, and no gradient flows through the weight. Under float16 autocast the losses are
    scaled up on the way back: the gradient of a mean over an image's pixels lies below float16's smallest number.

    Args:
        reference_loss, loss: scalars that both depend on ``parameter``.
        parameter: where the gradients are compared, such as the decoder's last weight.
        maximum: upper bound.
        among: take the gradients at all of these, ``parameter`` one of them, as a plain backward pass does; for
            comparisons of speed.

    Returns:
        Detached float32 scalar.
    """
    scale = gradient_scale(parameter.device)
    inputs = [parameter] if among is None else list(among)
    place = next(i for i, tensor in enumerate(inputs) if tensor is parameter)
    reference_gradient, gradient = (
        torch.autograd.grad(scale * term, inputs, retain_graph=True, allow_unused=among is not None)[place]
        for term in (reference_loss, loss)
    )
    return gradient_ratio(reference_gradient, gradient, maximum=maximum, scale=scale)


def gradient_ratio(reference: Tensor, gradient: Tensor, *, maximum: float, scale: float = 1.0) -> Tensor:
    """``|reference| / (|gradient| + 1e-4)``, clamped to ``[0, maximum]``, of gradients times ``scale``.

    Returns:
        Detached float32 scalar.
    """
    ratio = reference.float().norm() / (gradient.float().norm() + 1e-4 * scale)
    return ratio.clamp(0.0, maximum).detach()


def gradient_scale(device: torch.device) -> float:
    """Factor on a loss before it goes back by hand: above 1 under float16 autocast, see `adaptive_weight`."""
    half = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) == torch.float16
    return _FLOAT16_SCALE if half else 1.0


# ----------------------------------------------------------------------------------------------------------------
# davae.models.nested_base: An :class:`davae.AutoencoderDA` as the base of another one: how a further level of details finds its start.

import copy
from typing import Any

import torch
from torch import Tensor, nn


class NestedAdapter(BaseAdapter):
    """The level below: its latent is raw, ``[z, z_d1]`` as its own networks see it before normalisation."""

    def detail_encoder(self, base: Any) -> nn.Module:
        """A copy of the detail encoder below; it keeps its compression ``f``."""
        return copy.deepcopy(base.detail_encoder)

    def joint_decoder(self, base: Any) -> nn.Module:
        """A copy of the joint decoder below."""
        if base.joint_decoder is None:
            raise DavaeError(
                "the autoencoder has lost the joint decoder of a level: load it as it was trained"
            )
        return copy.deepcopy(base.joint_decoder)

    def network_adapter(self, base: Any) -> BaseAdapter:
        """That of the base VAE, whose networks all levels are copies of."""
        return base.adapter.network_adapter(base.base)

    def latent_layout(self, base: Any) -> LatentLayout:
        """Its base and detail channels."""
        return base.layout

    def latent_channels(self, base: Any) -> int:
        """``C`` and the details of all levels below."""
        return base.layout.channels

    def scale(self, base: Any) -> int:
        """Its resolution per side, as a multiple of the base VAE's."""
        return base.scale

    def encode(self, base: Any, images: Tensor) -> Tensor:
        """Raw ``[z, z_d1]``, posterior means."""
        return base.layout.join(base.encode_base(images), base.encode_details(images).mean)

    def decode(self, base: Any, z: Tensor) -> Tensor:
        """Images from raw ``[z, z_d1]``."""
        return base.decode_structured(*base.layout.split(z))

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """That of the base VAE; raw details are on the scale of the normalised base already (alignment)."""
        shift, scale = base.adapter.normalisation(base.base)
        added = shift.new_zeros(base.own_layout.detail_channels)
        return torch.cat([shift, added]), torch.cat([scale, added + 1.0])

    def drop_decoder(self, base: Any) -> None:
        """Its joint decoder, and the decoders below it."""
        base.up = base.joint_decoder = None
        base.drop_base_decoder()

    def encoder_head(self, base: Any) -> Convolution | None:
        """An estimate of the raw base latent: the grouped mean of the details below (alignment ties them)."""
        means = (
            base.own_layout.detail_channels // base.down.factor**2
        )  # convolution rows that serve means alone
        if not means:
            return None
        rows = torch.eye(base.down.conv.out_channels)[:, :means].repeat_interleave(base.down.factor**2, dim=0)
        rows = rows[: base.own_layout.detail_channels]  # [D, means]
        channels = base.layout.base_channels
        matrix = grouped_mean(rows.T[:, :, None, None], channels)[:, :, 0, 0].T  # [C, means]
        weight, bias = base.down.conv.weight.detach().float(), base.down.conv.bias.detach().float()
        shift, scale = (values[:channels] for values in base.base_affine(weight.device))
        matrix = matrix.to(weight) / scale[:, None]
        return Convolution(weight[:means], bias[:means]).then(matrix, shift)

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """As of the base VAE."""
        return base.adapter.pipeline_config(base.base)

    def pipeline_modules(self, base: Any, detail_channels: int) -> dict[str, nn.Module]:
        """As of the base VAE, with the details of all levels."""
        return base.adapter.pipeline_modules(base.base, base.own_layout.detail_channels + detail_channels)


# ----------------------------------------------------------------------------------------------------------------
# davae.models.option_checks: What the options of :class:`davae.AutoencoderDA` may be.

def check_options(scale: int, space: str, order: str, dropout: float) -> None:
    """Raise a :class:`DavaeError` for a value that does not exist, in the order of the constructor."""
    if scale not in (2, 4, 8):
        raise DavaeError(f"scale must be 2, 4 or 8, not {scale}")
    if space not in ("scaled", "raw"):
        raise DavaeError(f"base_latent_space must be 'scaled' or 'raw', not '{space}'")
    if order not in ("base_first", "detail_first"):
        raise DavaeError(f"decoder_channel_order must be 'base_first' or 'detail_first', not '{order}'")
    if not 0.0 <= dropout < 1.0:
        raise DavaeError(f"detail_dropout must lie in [0, 1), not {dropout}")


def check_detail_channels(detail_channels: int, scale: int) -> None:
    """Raise a :class:`DavaeError` for a number that the down block of the whole ``scale`` cannot make."""
    if detail_channels < 1 or 2 * detail_channels % scale**2:
        raise DavaeError(
            f"detail_channels must be a positive multiple of {scale**2 // 2} for scale {scale}, "
            f"not {detail_channels}"
        )


# ----------------------------------------------------------------------------------------------------------------
# davae.models.pipeline_config: Config entries by which unmodified diffusers pipelines find the upgraded autoencoder's sizes.

from typing import Any


# All of these follow from the base; the constructor makes them anew.
DERIVED_KEYS = frozenset(
    {
        "in_channels",
        "out_channels",
        "latent_channels",
        "block_out_channels",
        "encoder_block_out_channels",
        "sample_size",
        "scaling_factor",
        "shift_factor",
        "latents_mean",
        "latents_std",
        "force_upcast",
        "batch_norm_eps",
        "patch_size",
        "z_dim",
        "temperal_downsample",
    }
)


def derived_config(
    base: Any, further: dict[str, Any], layout: LatentLayout, *, scale: int, compression: int
) -> dict[str, Any]:
    """What an upgraded autoencoder's config says beyond its own settings.

    Pipelines take ``2 ** (len(block_out_channels) - 1)`` as pixels per latent position, so that list gets
    ``log2(s f) + 1`` entries; it counts levels and does not describe the network.

    Args:
        base: config of the base.
        further: entries that only pipelines of this kind of base read.
        layout: channel counts.
        scale: ``s``.
        compression: ``s * f``.

    Raises:
        DavaeError: ``s * f`` is not a power of two.
    """
    levels = compression.bit_length()
    if compression != 2 ** (levels - 1):
        raise DavaeError(f"the spatial compression {compression} is not a power of two")
    shift = base.get("shift_factor")
    derived: dict[str, Any] = {
        "in_channels": base.get("in_channels", 3),
        "out_channels": base.get("out_channels", 3),
        "latent_channels": layout.channels,
        "scaling_factor": base.get("scaling_factor", 1.0),
        "shift_factor": shift,
        "sample_size": _times(base.get("sample_size"), scale),
        "force_upcast": base.get("force_upcast", False),
        "block_out_channels": base.get("block_out_channels") or [1],
        **further,
    }
    mean, std = base.get("latents_mean"), base.get("latents_std")
    if mean is not None and std is not None:
        # (x - mean) * scaling / std and (x - shift) * scaling both give unit variance on the details.
        derived["latents_mean"] = [*mean, *[shift or 0.0] * layout.detail_channels]
        derived["latents_std"] = [*std, *[1.0] * layout.detail_channels]
    if base.get("temperal_downsample") is not None:  # autoencoders of videos: a level an entry
        derived["z_dim"] = layout.channels
        derived["temperal_downsample"] = (list(base["temperal_downsample"]) + [False] * levels)[: levels - 1]
    for key in ("block_out_channels", "encoder_block_out_channels"):
        if key in derived:
            widths = list(derived[key])
            derived[key] = (widths + [widths[-1]] * levels)[:levels]
    return derived


def _times(size: Any, scale: int) -> Any:
    if size is None:
        return None
    return [side * scale for side in size] if isinstance(size, (list, tuple)) else size * scale


# ----------------------------------------------------------------------------------------------------------------
# davae.models.portable: Models that can be opened where davae is not installed.

import functools
import os
from pathlib import Path
from typing import Any

from diffusers import ModelMixin


#: Beside the weights. ``model_index.json`` names the library ``davae``, and diffusers looks for a file of that name.
CODE_FILE = "davae.py"


class Portable:
    """First base of a davae model: saving also writes the file of code with which anyone can open it.

    The class must say ``__module__ = "davae"``: diffusers writes that into ``model_index.json`` as the library of the
    component. Where davae was imported, it is the class of davae that is loaded; elsewhere the one in the file, for
    people who pass ``trust_remote_code=True``.
    """

    _auto_class = "AutoModel"  # config.json names file and class for AutoModel.from_pretrained

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in diffusers, with the file of code beside the weights."""
        kind = type(self)
        if kind.__module__ == "davae":  # a class that someone else derived must bring its own code
            folder = Path(save_directory)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CODE_FILE).write_text(custom_code(kind.__name__), encoding="utf-8")
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]

    # Pipelines pass on what they find in the signature, which must be the family's.
    functools.update_wrapper(save_pretrained, ModelMixin.save_pretrained, assigned=(), updated=())

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """What ``config.json`` says for AutoModel is no argument of the model."""
        own = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(own, **kwargs)  # type: ignore[misc]


# ----------------------------------------------------------------------------------------------------------------
# davae.models.residual_sampling: Residual space-to-channel and channel-to-space blocks (DC-AE, arXiv 2410.10733, Sec. 3.2).

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualDownsample(nn.Module):
    """From ``[B, in, H, W]`` to ``[B, out, H / f, W / f]``: a learned branch plus a shortcut.

    ``unshuffle(conv(x)) + mean_groups(unshuffle(x))``, with a 3x3 convolution to ``out / f^2`` channels. The
    shortcut averages runs of ``in f^2 / out`` consecutive channels where that number is whole; elsewhere a
    bias-free 1x1 convolution that starts at zero takes its place.

    Args:
        in_channels, out_channels: channel counts.
        factor: ``f``.
        method: ``"unshuffle"`` as above, or ``"stride"``: a 3x3 convolution of stride ``f`` in the learned
            branch.
        shortcut: leave the shortcut out with False.

    Raises:
        DavaeError: ``out`` is not a multiple of ``f^2`` (method ``unshuffle``).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int,
        *,
        method: Literal["unshuffle", "stride"] = "unshuffle",
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.out_channels, self.factor, self.method, self.shortcut = out_channels, factor, method, shortcut
        cells = factor * factor
        if method == "unshuffle" and out_channels % cells:
            raise DavaeError(f"{out_channels} output channels do not divide by {factor}² = {cells}")
        width = out_channels // cells if method == "unshuffle" else out_channels
        stride = 1 if method == "unshuffle" else factor
        self.conv = nn.Conv2d(in_channels, width, kernel_size=3, stride=stride, padding=1)
        self.shortcut_proj: nn.Conv2d | None = None
        if shortcut and in_channels * cells % out_channels:
            self.shortcut_proj = _zero_projection(in_channels * cells, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, H, W]`` to ``[B, out, H / f, W / f]``; sides must be multiples of ``f``."""
        y = self.conv(x)
        if self.method == "unshuffle":
            y = F.pixel_unshuffle(y, self.factor)  # [B, out, H/f, W/f]
        if not self.shortcut:
            return y
        x = F.pixel_unshuffle(x, self.factor)  # [B, in f^2, H/f, W/f]
        if self.shortcut_proj is not None:
            return y + self.shortcut_proj(x)
        return y + x.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class ResidualUpsample(nn.Module):
    """From ``[B, in, h, w]`` to ``[B, out, f h, f w]``: a learned branch plus a shortcut.

    ``shuffle(conv(x)) + shuffle(repeat(x))``, with a 3x3 convolution to ``out f^2`` channels. The shortcut
    repeats each channel ``out f^2 / in`` times in a row where that number is whole; elsewhere a bias-free 1x1
    convolution that starts at zero takes its place. It maps channels by position, so their order matters.

    Args:
        in_channels, out_channels: channel counts.
        factor: ``f``.
        method: ``"shuffle"`` as above, or ``"nearest"``: nearest-neighbour resize, then a 3x3 convolution.
        shortcut: leave the shortcut out with False.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        factor: int,
        *,
        method: Literal["shuffle", "nearest"] = "shuffle",
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.factor, self.method, self.shortcut = factor, method, shortcut
        self.shortcut_channels = out_channels * factor * factor
        width = self.shortcut_channels if method == "shuffle" else out_channels
        self.conv = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.shortcut_proj: nn.Conv2d | None = None
        if shortcut and self.shortcut_channels % in_channels:
            self.shortcut_proj = _zero_projection(in_channels, self.shortcut_channels)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in, h, w]`` to ``[B, out, f h, f w]``."""
        if self.method == "shuffle":
            y = F.pixel_shuffle(self.conv(x), self.factor)  # [B, out, fh, fw]
        else:
            y = self.conv(F.interpolate(x, scale_factor=float(self.factor), mode="nearest"))
        if not self.shortcut:
            return y
        if self.shortcut_proj is not None:
            x = self.shortcut_proj(x)
        else:  # expand and flatten, not repeat_interleave, which exporters cannot follow
            repeats = self.shortcut_channels // x.shape[1]
            x = x.unsqueeze(2).expand(-1, -1, repeats, -1, -1).flatten(1, 2)  # [B, out f^2, h, w]
        return y + F.pixel_shuffle(x, self.factor)


def _zero_projection(in_channels: int, out_channels: int) -> nn.Conv2d:
    projection = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
    nn.init.zeros_(projection.weight)
    return projection


# ----------------------------------------------------------------------------------------------------------------
# davae.models.structured_posterior: The posterior of a structured latent: a fixed base part, a Gaussian detail part.

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class StructuredPosterior:
    """``latent_dist`` of ``AutoencoderDA.encode``: latents ``[z, x_d]`` as pipelines have them.

    The base part is the base VAE's posterior mean in every sample; only the details vary.

    Args:
        layout: channel counts.
        z: base latent ``[B, C, h, w]``.
        detail_mean, detail_std: of the details in the pipeline's convention, ``[B, D, h, w]``.
    """

    def __init__(self, layout: LatentLayout, z: Tensor, detail_mean: Tensor, detail_std: Tensor) -> None:
        self.layout = layout
        self.mean = layout.join(z, detail_mean)  # [B, C + D, h, w]
        self.std = layout.join(torch.zeros_like(z), detail_std)

    @property
    def var(self) -> Tensor:
        """Variance ``[B, C + D, h, w]``; zero on the base channels."""
        return self.std.square()

    def mode(self) -> Tensor:
        """The mean, ``[B, C + D, h, w]``."""
        return self.mean

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """A sample ``[B, C + D, h, w]``; its base part is the mean, bit for bit."""
        z, mean = self.layout.split(self.mean)
        _, std = self.layout.split(self.std)
        noise = randn_tensor(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        return self.layout.join(z, mean + std * noise)


# ----------------------------------------------------------------------------------------------------------------
# davae.models.single_frame: Images as videos of one frame, as autoencoders that come from video models and their pipelines hold them.

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor


class SingleFramePosterior:
    """A posterior over ``[B, C, h, w]`` seen as one over ``[B, C, 1, h, w]``."""

    def __init__(self, images: StructuredPosterior) -> None:
        self.images = images

    @property
    def mean(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.mean.unsqueeze(2)

    @property
    def std(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.std.unsqueeze(2)

    @property
    def var(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.var.unsqueeze(2)

    def mode(self) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.mode().unsqueeze(2)

    def sample(self, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """``[B, C, 1, h, w]``."""
        return self.images.sample(generator).unsqueeze(2)


def takes_single_frame(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of images ``[B, C, H, W]`` also takes ``[B, C, 1, H, W]``, and then gives everything with that axis.

    A call with images passes through untouched.

    Raises:
        DavaeError: more than one frame.
    """

    @functools.wraps(method)
    def with_frames(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.ndim != 5:
            return method(self, x, *args, **kwargs)
        if x.shape[2] != 1:
            raise DavaeError(f"{x.shape[2]} frames were given: this autoencoder makes single images")
        return _with_frame(method(self, x.squeeze(2), *args, **kwargs))

    return with_frames


def _with_frame(result: Any) -> Any:
    if isinstance(result, tuple) and not hasattr(result, "_fields"):
        return tuple(_with_frame(part) for part in result)
    if isinstance(result, Tensor):
        return result.unsqueeze(2)
    if isinstance(result, StructuredPosterior):
        return SingleFramePosterior(result)
    if isinstance(result, DecoderOutput):
        return DecoderOutput(sample=result.sample.unsqueeze(2))
    if isinstance(result, AutoencoderKLOutput):
        return AutoencoderKLOutput(latent_dist=SingleFramePosterior(result.latent_dist))
    raise TypeError(f"nothing is known about frames of a {type(result).__name__}")


def without_alpha(images: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` of such with three channels, or with four, of which the last is opacity."""
    return images[:, :3] if images.shape[1] == 4 else images


# ----------------------------------------------------------------------------------------------------------------
# davae.models.warm_blocks: Start values for the new blocks that let the autoencoder begin with a sensible image.

from itertools import product

import torch
from torch import Tensor


START_LOGVAR = -6.0  # standard deviation 0.05: samples start close to their mean


@torch.no_grad()
def warm_up_block(
    block: ResidualUpsample, stem: Convolution, layout: LatentLayout, *, detail_first: bool
) -> None:
    """Make the block give ``stem`` of an estimate of the full-resolution base latent.

    With ``D = s^2 C`` the details are that latent unshuffled, up to their group's mean, which is the base's to
    tell: the estimate at sub-pixel k is ``z + z_d[k] - mean(z_d)``, and ``z`` alone where the details are zero.
    With another D the estimate is ``z`` at every sub-pixel.

    Args:
        block: its channels as the decoder sees them.
        stem: base channels to first features, ``[F, C, 3, 3]``.
        layout: channel counts.
        detail_first: the block's input has the details in front.
    """
    cells, base, details = block.factor**2, layout.base_channels, layout.detail_channels
    estimate = torch.zeros(base * cells, layout.channels)  # [C s^2, C + D]
    estimate[:, :base] = torch.eye(base).repeat_interleave(cells, dim=0)
    if details == base * cells:
        centred = torch.eye(cells) - 1 / cells
        estimate[:, base:] = torch.block_diag(*[centred] * base)
    if detail_first:
        estimate = estimate.roll(details, dims=1)
    shuffled = _before_shuffle(stem.weight.float().cpu(), block.factor)  # [F s^2, C s^2, 3, 3]
    weight = torch.einsum("ochw,ci->oihw", shuffled, estimate)
    _set_up_block(block, Convolution(weight, stem.bias.repeat_interleave(cells)))


@torch.no_grad()
def warm_nested_up_block(
    block: ResidualUpsample,
    below: Convolution,
    stem: Convolution | None,
    layout: LatentLayout,
    factor_below: int,
    *,
    detail_first: bool,
) -> None:
    """Make the block of a further level give the first features of the level below, each repeated.

    The start is thus an enlargement of what the level below makes, as it was trained. With ``D = s^2 C`` the new
    details are the base latent at full resolution, unshuffled; what they hold beyond the level below, their
    difference from the mean of a repeated cell, goes through the base's stem and is added.

    Args:
        block: its channels as the decoder sees them.
        below: the block below in front of its shuffle, ``[F t^2, C + D_below, 3, 3]``.
        stem: base channels to first features, ``[F, C, 3, 3]``, where that is one convolution.
        layout: channels below this level, and the ones that it adds.
        factor_below: ``t``, the factor of the block below.
        detail_first: the block's input has the details of this level in front.
    """
    repeats, cells = block.factor // factor_below, block.factor**2
    base, details = layout.base_channels, layout.detail_channels
    weight = torch.zeros(block.shortcut_channels, layout.channels, 3, 3)
    weight[:, :base] = _repeat_subpixels(below.weight.cpu(), factor_below, repeats)
    if stem is not None and details == stem.weight.shape[1] * cells:
        mean = torch.eye(factor_below).repeat_interleave(repeats, dim=0)  # [s, t]: row -> cell below
        mean = mean @ mean.T / repeats
        centred = torch.eye(cells) - torch.kron(mean, mean)  # [s^2, s^2]
        estimate = torch.block_diag(*[centred] * stem.weight.shape[1])  # [C s^2, D]
        shuffled = _before_shuffle(stem.weight.float().cpu(), block.factor)
        weight[:, base:] = torch.einsum("ochw,ci->oihw", shuffled, estimate)
    if detail_first:
        weight = weight.roll(details, dims=1)
    _set_up_block(block, Convolution(weight, _repeat_subpixels(below.bias, factor_below, repeats)))


def _repeat_subpixels(channels: Tensor, factor: int, repeats: int) -> Tensor:
    """Channels in front of a shuffle by ``f``, ``[F f^2, ...]``, for one by ``f r`` that repeats each pixel."""
    grid = channels.unflatten(0, (-1, factor, factor))
    grid = grid.repeat_interleave(repeats, dim=1).repeat_interleave(repeats, dim=2)
    return grid.flatten(0, 2)


def _set_up_block(block: ResidualUpsample, wanted: Convolution) -> None:
    """Set the learned branch so that the whole block gives ``wanted`` in front of its shuffle."""
    weight = wanted.weight.clone()
    if block.shortcut and block.shortcut_proj is None:  # what the shortcut adds is taken off again
        weight -= _shortcut(block).to(weight)
    block.conv.weight.copy_(weight)
    assert block.conv.bias is not None
    block.conv.bias.copy_(wanted.bias)


@torch.no_grad()
def folded_up_block(block: ResidualUpsample, layout: LatentLayout, *, detail_first: bool) -> Convolution:
    """The block in front of its shuffle as one convolution, ``[F f^2, C + D, 3, 3]``, base channels first."""
    assert block.conv.bias is not None
    weight = block.conv.weight.detach().float().clone()
    if block.shortcut_proj is not None:
        weight[:, :, 1, 1] += block.shortcut_proj.weight[:, :, 0, 0]
    elif block.shortcut:
        weight += _shortcut(block).to(weight)
    if detail_first:
        weight = weight.roll(-layout.detail_channels, dims=1)
    return Convolution(weight, block.conv.bias.detach().float())


def _shortcut(block: ResidualUpsample) -> Tensor:
    """The shortcut that repeats channels as a 3x3 convolution, ``[F f^2, in, 3, 3]``."""
    weight = torch.zeros(block.shortcut_channels, block.conv.in_channels, 3, 3)
    outputs = torch.arange(block.shortcut_channels)
    weight[outputs, outputs // (block.shortcut_channels // block.conv.in_channels), 1, 1] = 1.0
    return weight


def _before_shuffle(weight: Tensor, factor: int) -> Tensor:
    """The 3x3 convolution on an unshuffled grid that equals ``weight`` on the shuffled one, exactly.

    ``pixel_shuffle(conv(x, result)) = conv(pixel_shuffle(x), weight)``: the neighbour of sub-pixel ``a`` at offset
    ``d`` is sub-pixel ``(a + d) mod f`` of the cell ``(a + d) // f``, which is at most one cell away.

    Args:
        weight: ``[out, in, 3, 3]``.
        factor: ``f``.

    Returns:
        ``[out f^2, in f^2, 3, 3]``.
    """
    out_channels, in_channels = weight.shape[:2]
    f = factor
    result = weight.new_zeros(out_channels, f, f, in_channels, f, f, 3, 3)
    for row, column, dy, dx in product(range(f), range(f), (-1, 0, 1), (-1, 0, 1)):
        y, x = row + dy, column + dx
        result[:, row, column, :, y % f, x % f, y // f + 1, x // f + 1] = weight[:, :, dy + 1, dx + 1]
    return result.reshape(out_channels * f * f, in_channels * f * f, 3, 3)


@torch.no_grad()
def warm_down_block(block: ResidualDownsample, head: Convolution, layout: LatentLayout) -> None:
    """Make the learned branch give the full-resolution base latent as mean and a small variance.

    Every row of the convolution serves ``s^2`` consecutive latent channels. With ``D = s^2 C`` each row is
    one base channel; elsewhere rows are the mixtures whose grouped mean is nearest to the base channels
    (least squares).

    Args:
        block: last features to mean and log-variance, ``2 D`` channels.
        head: last features to the base channels, ``[C, F, 3, 3]``.
        layout: channel counts.
    """
    cells, details = block.factor**2, layout.detail_channels
    rows = block.conv.out_channels
    means = details // cells  # rows that serve mean channels only
    first_logvar = -(-details // cells)
    weight = torch.zeros_like(block.conv.weight, dtype=torch.float32)
    bias = torch.zeros(rows, device=weight.device)
    if means:
        spread = torch.eye(rows)[:, :means].repeat_interleave(cells, dim=0)[
            :details
        ]  # [D, means]: row -> channels
        grouped = grouped_mean(spread.T[:, :, None, None], layout.base_channels)[:, :, 0, 0].T  # [C, means]
        mixture = torch.linalg.pinv(grouped).to(weight)  # [means, C]
        mixed = head.then(mixture, torch.zeros_like(mixture[:, 0]))
        weight[:means], bias[:means] = mixed.weight, mixed.bias
    bias[first_logvar:] = START_LOGVAR
    block.conv.weight.copy_(weight)
    assert block.conv.bias is not None
    block.conv.bias.copy_(bias)


# ----------------------------------------------------------------------------------------------------------------
# davae.models.start_from_base: Start values of a new level's two blocks from what the level stands on.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def start_blocks_from_base(model: Any) -> None:
    """Give the down block and the up block of an :class:`davae.AutoencoderDA` their start values.

    A base whose layers at the latent are not single convolutions leaves torch's random start.
    """
    base_channels, details = model.layout.base_channels, model.own_layout.detail_channels
    shift, scale = (values[:base_channels] for values in model.base_affine(model.device))
    head = model.adapter.encoder_head(model.base)
    if head is not None:
        head = head.then(torch.diag(scale), -shift * scale)
        warm_down_block(model.down, head, LatentLayout(base_channels, details))
    stem = model.adapter.network_adapter(model.base).decoder_stem(model.base_vae)
    if stem is not None:
        stem = stem.after(torch.diag(1.0 / scale), shift)
    detail_first = _detail_first(model)
    if model.below is not None:
        start = _as_seen_above(model.below, *model.base_affine(model.device))
        warm_nested_up_block(
            model.up, start, stem, model.own_layout, model.below.scale, detail_first=detail_first
        )
    elif stem is not None:
        warm_up_block(model.up, stem, model.own_layout, detail_first=detail_first)


def _as_seen_above(model: Any, shift: Tensor, scale: Tensor) -> Convolution:
    """The model's up block in front of its shuffle, for latents ``(raw - shift) * scale`` of all its channels."""
    convolution = folded_up_block(model.up, model.own_layout, detail_first=_detail_first(model))
    details = model.own_layout.detail_channels  # its own are raw in its decoder
    own_shift, own_scale = model.base_affine(shift.device)
    own_shift, own_scale = F.pad(own_shift, (0, details)), F.pad(own_scale, (0, details), value=1.0)
    return convolution.after(torch.diag(own_scale / scale), (shift - own_shift) * own_scale)


def _detail_first(model: Any) -> bool:
    return bool(model.config.decoder_channel_order == "detail_first")


# ----------------------------------------------------------------------------------------------------------------
# davae.models.whole_image_norms: Group norms that use the statistics of the whole image while a network sees one tile at a time.

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor, nn


class WholeImageNorms:
    """While active, group norms remember the statistics of the first input and apply them to every later one.

    A group norm takes mean and variance over all positions, so tiles of one image would each be normalised
    differently and their colours and contrast would not meet. Here the first call is made with the whole image,
    reduced to the size of a tile; the tiles then share its statistics.

    Args:
        networks: where to look for group norms. Others (batch, RMS, none) look at single positions already.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self._norms = [m for network in networks for m in network.modules() if isinstance(m, nn.GroupNorm)]
        self._statistics: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self._affine: dict[nn.GroupNorm, tuple[Tensor, Tensor]] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __bool__(self) -> bool:
        """Whether there is any group norm."""
        return bool(self._norms)

    def __enter__(self) -> WholeImageNorms:
        self._handles = [norm.register_forward_hook(self._apply) for norm in self._norms]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._statistics.clear()
        self._affine.clear()

    def _apply(self, norm: nn.GroupNorm, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = arguments[0]  # [B, C, ...]
        groups = x.reshape(x.shape[0], norm.num_groups, -1).float()
        if norm not in self._statistics:
            variance, mean = torch.var_mean(groups, dim=-1, keepdim=True, correction=0)
            self._statistics[norm] = mean, variance
            if norm.affine:
                self._affine[norm] = _affine(norm, x.device)
            return output
        mean, variance = self._statistics[norm]
        y = ((groups - mean) * (variance + norm.eps).rsqrt()).reshape(x.shape)
        shape = (1, -1) + (1,) * (x.ndim - 2)
        if norm.affine:
            weight, bias = self._affine[norm]
            y = y * weight.view(shape) + bias.view(shape)
        return y.to(output.dtype)


def _affine(norm: nn.GroupNorm, device: torch.device) -> tuple[Tensor, Tensor]:
    """Weight and bias in float32, brought back for a moment where offloading took them when ``forward`` ended."""
    hook = getattr(norm, "_hf_hook", None)  # accelerate's
    if (diffusers_hooks := getattr(norm, "_diffusers_hook", None)) is not None:
        hook = diffusers_hooks.get_hook("group_offloading")
    if hook is not None:
        hook.pre_forward(norm)
    weight, bias = (
        values.to(device, torch.float32, copy=hook is not None) for values in (norm.weight, norm.bias)
    )
    if hook is not None:
        hook.post_forward(norm, None)
    return weight, bias


# ----------------------------------------------------------------------------------------------------------------
# davae.models.tiling: Large inputs in overlapping tiles, blended so that no seam shows.

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def tiled(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    tile: int,
    overlap: int,
    cell_in: int,
    cell_out: int,
    networks: Sequence[nn.Module] = (),
) -> Tensor:
    """``function(x)``, computed tile by tile.

    Tiles all have the same size; the last one of a row or column is moved back to end with the input. Where tiles
    overlap, their outputs are mixed with linear ramps. The outer quarter of an overlap gets no weight at all:
    there the convolutions see the tile's zero padding instead of the image. Group norms take their statistics
    from the whole input, reduced to the size of a tile.

    What stays different from ``function(x)``: attention looks no further than its tile, and the group norms'
    statistics are estimates.

    Args:
        function: maps ``[B, C, n * cell_in, m * cell_in]`` to ``[B, C', n * cell_out, m * cell_out]``.
        x: ``[B, C, H, W]``, sides multiples of ``cell_in``.
        tile, overlap: in cells (latent positions), ``overlap < tile``.
        cell_in, cell_out: side of one cell in the input and in the output.
        networks: what ``function`` calls, searched for group norms.

    Returns:
        ``[B, C', H / cell_in * cell_out, W / cell_in * cell_out]`` in the dtype of ``function``'s output.
    """
    rows, columns = x.shape[-2] // cell_in, x.shape[-1] // cell_in
    total: Tensor | None = None
    weights = torch.zeros(rows * cell_out, columns * cell_out, device=x.device)
    with WholeImageNorms(networks) as norms:
        if norms:
            function(_reduced(x, tile, cell_in))
        for top in _starts(rows, tile, overlap):
            for left in _starts(columns, tile, overlap):
                y = function(_crop(x, top, left, tile, cell_in))
                if total is None:
                    total = torch.zeros(*y.shape[:-2], *weights.shape, device=y.device)
                weight = torch.outer(
                    _ramps(top, rows, tile, overlap, cell_out, x.device),
                    _ramps(left, columns, tile, overlap, cell_out, x.device),
                )
                _crop(total, top, left, tile, cell_out).add_(y.float() * weight)
                _crop(weights, top, left, tile, cell_out).add_(weight)
    assert total is not None
    return (total / weights).to(y.dtype)


def _reduced(x: Tensor, tile: int, cell: int) -> Tensor:
    """``x`` at the size of a tile: images resampled, latents (cells of one position) thinned out."""
    cells = max(x.shape[-2:]) // cell
    size = [max(1, round(side // cell * tile / cells)) * cell for side in x.shape[-2:]]
    if cell == 1:  # averaging latents would lower their variance
        return F.interpolate(x, size=size, mode="nearest-exact")
    return F.interpolate(x.float(), size=size, mode="bicubic", antialias=True, align_corners=False).to(
        x.dtype
    )


def _crop(x: Tensor, top: int, left: int, tile: int, cell: int) -> Tensor:
    """The part of ``x`` under a tile, as a view."""
    rows, columns = (slice(start * cell, (start + tile) * cell) for start in (top, left))
    return x[..., rows, columns]


def _starts(size: int, tile: int, overlap: int) -> list[int]:
    """First cells of the tiles along one side."""
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def _ramps(start: int, size: int, tile: int, overlap: int, cell: int, device: torch.device) -> Tensor:
    """Blending weights of one tile along one side, in output positions; 1 towards the border of the whole."""
    tile = min(tile, size)
    length, margin = overlap * cell, overlap * cell // 4
    position = torch.arange(tile * cell, device=device, dtype=torch.float32) + 0.5
    weight = torch.ones_like(position)
    if length and start > 0:
        weight = weight * ((position - margin) / (length - 2 * margin)).clamp(0, 1)
    if length and start + tile < size:
        weight = weight * ((position.flip(0) - margin) / (length - 2 * margin)).clamp(0, 1)
    return weight


# ----------------------------------------------------------------------------------------------------------------
# davae.models.tiles_and_slices: How an autoencoder goes through large inputs: by tiles, or one sample of the batch at a time.

from collections.abc import Callable

import torch
from torch import Tensor, nn


class TilesAndSlices(OnABase):
    """Tiling and slicing of an :class:`davae.AutoencoderDA`; the levels below follow its switches."""

    factor: int
    use_tiling: bool
    use_slicing: bool
    tile_sample_min_size: int
    tile_overlap_factor: float

    def enable_tiling(
        self, tile_sample_min_size: int | None = None, tile_overlap_factor: float | None = None
    ) -> None:
        """Encode and decode larger images in overlapping tiles; see :func:`davae.models.tiling.tiled`.

        Args:
            tile_sample_min_size: side of a tile in pixels of the full-resolution image, a multiple of ``s *
                f``.
            tile_overlap_factor: part of a tile that overlaps its neighbour, in [0, 0.5].

        Raises:
            DavaeError: a value out of range.
        """
        size = tile_sample_min_size or self.tile_sample_min_size
        factor = self.tile_overlap_factor if tile_overlap_factor is None else tile_overlap_factor
        if size % self.spatial_compression:
            raise DavaeError(f"tile size {size} is not a multiple of {self.spatial_compression} pixels")
        if not 0.0 <= factor <= 0.5:
            raise DavaeError(f"tile_overlap_factor must lie in [0, 0.5], not {factor}")
        self.use_tiling, self.tile_sample_min_size, self.tile_overlap_factor = True, size, factor
        if self.below is not None:  # the same tiles, in latent positions
            self.below.enable_tiling(size // self.factor, factor)

    def disable_tiling(self) -> None:
        """Encode and decode in one step."""
        self._switch("use_tiling", on=False)

    def enable_slicing(self) -> None:
        """Encode and decode one sample of a batch at a time."""
        self._switch("use_slicing", on=True)

    def disable_slicing(self) -> None:
        """Encode and decode whole batches."""
        self._switch("use_slicing", on=False)

    def _switch(self, name: str, *, on: bool) -> None:
        setattr(self, name, on)
        if self.below is not None:
            self.below._switch(name, on=on)

    def _tiled(
        self, function: Callable[[Tensor], Tensor], network: nn.Module, cell_in: int, cell_out: int
    ) -> Callable[[Tensor], Tensor]:
        """``function``, which calls ``network``, by tiles where tiling is on and the input larger than one."""
        tile = self.tile_sample_min_size // self.spatial_compression

        def apply(x: Tensor) -> Tensor:
            if not self.use_tiling or max(x.shape[-2:]) <= tile * cell_in:
                return function(x)
            overlap = round(tile * self.tile_overlap_factor)
            return tiled(
                function,
                x,
                tile=tile,
                overlap=overlap,
                cell_in=cell_in,
                cell_out=cell_out,
                networks=[network],
            )

        return apply

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, one sample at a time where slicing is on."""
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([function(part) for part in x.split(1)])
        return function(x)


# ----------------------------------------------------------------------------------------------------------------
# davae.models.autoencoder_da: The detail-aligned autoencoder: a frozen base VAE plus detail channels on the same latent grid.

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn


LatentSpace = Literal["scaled", "raw"]
ChannelOrder = Literal["base_first", "detail_first"]


class AutoencoderDA(
    Levels, DetailNormalisation, TilesAndSlices, Portable, ModelMixin, AutoencoderMixin, ConfigMixin
):
    """A diffusers autoencoder whose latent is ``[z, z_d]``: the base VAE's latent and ``D`` detail channels.

    ``z`` (``C`` channels) is the base latent of the image at base resolution, untouched. ``z_d`` is encoded
    from the full-resolution image, ``s`` times larger per side, onto the same grid. One decoder makes the
    full-resolution image from both. Make one with :meth:`from_base`; afterwards it stands alone
    (``save_pretrained``, ``from_pretrained``).

    ``encode`` and ``decode`` speak the convention of the base's pipelines: the base part is the base VAE's
    own latent, and the details are normalised so that ``(latent - shift_factor) * scaling_factor`` has unit
    variance on them.

    The base never changes: its weights take no gradient and it stays in eval mode, also after ``train()``.

    The base may be an ``AutoencoderDA`` itself. The latent then has levels, ``[z, z_d1, z_d2]``, and this one's
    ``z_d`` is all of the details: ``layout``, ``scale``, ``encode``, ``decode``, ``encode_base``,
    ``encode_details`` and ``decode_structured`` speak of the whole, ``own_layout``, ``factor``,
    ``encode_prefix`` and ``encode_own_details`` of what this level adds. See :class:`davae.models.levels.Levels`.

    Args:
        base_class: class name of the base, see :func:`davae.models.find_adapter`.
        base_config: its config.
        scale: 2, 4 or 8: ``s``, or on a base with levels the factor that this level adds to its scale.
        detail_channels: ``D``, a multiple of ``s^2 / 2``; the channels that this level adds.
        antialias: antialias the bicubic reduction to base resolution.
        clamp_base_image: clamp the reduced image to [-1, 1].
        base_latent_space: what alignment and joint decoder see: ``"scaled"``, ``(z - shift) * scale`` as the
            diffusion model does, or ``"raw"``.
        decoder_channel_order: order of the parts in front of the up block only; ``"detail_first"`` serves
            published weights. Latents are base first everywhere.
        detail_dropout: probability of zeroing the whole detail latent of a sample in front of the decoder, in
            training.
        detail_mean, detail_std: per-channel statistics of ``z_d``; None is 0 and 1. See
            :meth:`set_detail_statistics`.
        branch_config: config of the base class for the detail encoder and the joint decoder, where they are
            built differently from the base (same compression).
        has_base_decoder: False where the base's decoder is not known, as in some published files, or dropped
            (:meth:`drop_base_decoder`). Everything works without it except :meth:`decode_base` and the lower levels.

    Raises:
        DavaeError: an unknown base, or sizes that do not fit.
    """

    __module__ = "davae"  # the library by which saved pipelines know it
    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "FrugalResnetBlock2D"]  # noqa: RUF012 (the form)
    _group_offload_block_modules = ["base", "detail_encoder", "down", "up", "joint_decoder"]  # noqa: RUF012
    _skip_keys = ["feat_cache", "feat_idx"]  # noqa: RUF012 (lists that autoencoders of videos change in place)

    @register_to_config
    def __init__(
        self,
        base_class: str,
        base_config: dict[str, Any],
        scale: int,
        detail_channels: int,
        antialias: bool = True,
        clamp_base_image: bool = False,
        base_latent_space: LatentSpace = "scaled",
        decoder_channel_order: ChannelOrder = "base_first",
        detail_dropout: float = 0.1,
        detail_mean: list[float] | None = None,
        detail_std: list[float] | None = None,
        branch_config: dict[str, Any] | None = None,
        has_base_decoder: bool = True,
    ) -> None:
        super().__init__()
        check_options(scale, base_latent_space, decoder_channel_order, detail_dropout)
        model_class, self.adapter = find_adapter(base_class)
        self.base = model_class.from_config(base_config)
        self.factor, self.scale = scale, scale * self.adapter.scale(self.base)
        check_detail_channels(detail_channels, self.scale)
        base_layout = self.adapter.latent_layout(self.base)
        self.own_layout = LatentLayout(base_layout.channels, detail_channels)
        self.layout = LatentLayout(base_layout.base_channels, base_layout.detail_channels + detail_channels)

        branch = self.base if branch_config is None else model_class.from_config(branch_config)
        self.detail_encoder = self.adapter.detail_encoder(branch)
        self.joint_decoder = self.adapter.joint_decoder(branch)
        networks = self.adapter.network_adapter(self.base)
        encoder_features, self.base_compression = networks.probe_encoder(self.detail_encoder)
        decoder_features = networks.decoder_channels(self.joint_decoder)
        self.down = ResidualDownsample(
            encoder_features, 2 * detail_channels, self.scale
        )  # mean, log-variance
        self.up = ResidualUpsample(self.layout.channels, decoder_features, self.scale)
        self._add_pipeline_parts(self.base)
        self._group_offload_block_modules = [*self._group_offload_block_modules, *offloaded_blocks(self.base)]
        if not has_base_decoder:
            self.adapter.drop_decoder(self.base)
        self.trains_below = False
        self.base.requires_grad_(False).eval()

        self.use_slicing = False
        self.use_tiling = False
        sample_size = self.config.sample_size or 0
        sample_size = max(sample_size) if isinstance(sample_size, (list, tuple)) else sample_size
        self.tile_sample_min_size = max(int(sample_size), 32 * self.spatial_compression)  # pixels
        self.tile_overlap_factor = 0.25

    @classmethod
    def from_base(
        cls,
        base: ModelMixin,
        *,
        scale: int = 2,
        detail_channels: int,
        antialias: bool = True,
        clamp_base_image: bool = False,
        base_latent_space: LatentSpace = "scaled",
        decoder_channel_order: ChannelOrder = "base_first",
        detail_dropout: float = 0.1,
        warm_blocks: bool = True,
    ) -> AutoencoderDA:
        """A new autoencoder on a pretrained base, which is copied and not changed.

        Detail encoder and joint decoder start from the base's weights. The model is in eval mode, like a
        loaded one.

        Args:
            base: a diffusers autoencoder, or an :class:`AutoencoderDA`, which becomes the levels below.
            warm_blocks: start the two new blocks from the base's layers that they replace (see
                :mod:`davae.models.warm_blocks`); False leaves torch's random start.
            scale, detail_channels, antialias, clamp_base_image, base_latent_space, decoder_channel_order,
            detail_dropout:
                see the class.

        Raises:
            DavaeError: an unknown base (the message names the adapter's methods to write), sizes that do not
                fit, or a base whose weights are offloaded.
        """
        model_class, _ = find_adapter(type(base).__name__)
        if any(parameter.is_meta for parameter in base.parameters()):
            raise DavaeError(
                "the base's weights are offloaded: take the VAE before offloading is switched on"
            )
        model = cls(
            base_class=type(base).__name__,
            base_config=constructor_arguments(model_class, base.config),
            scale=scale,
            detail_channels=detail_channels,
            antialias=antialias,
            clamp_base_image=clamp_base_image,
            base_latent_space=base_latent_space,
            decoder_channel_order=decoder_channel_order,
            detail_dropout=detail_dropout,
            detail_mean=None,
            detail_std=None,
        )
        for part in model.children():
            nn.Module.to(part, device=base.device, dtype=base.dtype)  # diffusers' own warns of islands
        model.base.load_state_dict(base.state_dict())
        model.detail_encoder.load_state_dict(model.adapter.detail_encoder(base).state_dict())
        model.joint_decoder.load_state_dict(model.adapter.joint_decoder(base).state_dict())
        model._add_pipeline_parts(base)
        if warm_blocks:
            start_blocks_from_base(model)
        return model.eval()

    def _add_pipeline_parts(self, base: Any) -> None:
        """Config entries and modules that unmodified pipelines read."""
        further = self.adapter.pipeline_config(base)
        compression = self.spatial_compression
        derived = derived_config(
            base.config, further, self.own_layout, scale=self.factor, compression=compression
        )
        self.register_to_config(**derived)
        if "temperal_downsample" in derived:  # pipelines read it from the model
            self.temperal_downsample = derived["temperal_downsample"]
        for name, module in self.adapter.pipeline_modules(base, self.own_layout.detail_channels).items():
            setattr(self, name, module.to(device=base.device))

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Config entries that follow from the base are made anew by the constructor."""
        # Without the list of defaulted arguments: statistics that were set later would count as not given.
        dropped = DERIVED_KEYS | {"_use_default_values"}
        own = {key: value for key, value in config_dict.items() if key not in dropped}
        return super().extract_init_dict(own, **kwargs)

    # ------------------------------------------------------------------ what it is

    @property
    def last_decoder_weight(self) -> Tensor:
        """Weight of the joint decoder's last convolution: the adaptive GAN weight compares gradients here."""
        return [m for m in self.joint_decoder.modules() if isinstance(m, nn.Conv2d)][-1].weight

    @property
    def alignment_weight(self) -> Tensor:
        """Weight of the down block's convolution, where the adaptive alignment weight compares gradients."""
        return self.down.conv.weight

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Everything but the base, and of a base with levels everything but its own, where it learns too."""
        if self.below is not None and self.trains_below:
            yield from self.below.trained_parameters()
        for part in (self.detail_encoder, self.down, self.up, self.joint_decoder):
            yield from part.parameters()

    def train(self, mode: bool = True) -> AutoencoderDA:
        """As in torch, but the base stays in eval mode."""
        super().train(mode)
        self.base.train(mode and self.trains_below)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> AutoencoderDA:
        """As in torch, but the base stays frozen."""
        super().requires_grad_(requires_grad)
        self.base.requires_grad_(requires_grad and self.trains_below)
        return self

    def base_affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``shift`` and ``scale``, float32 ``[C]``, of the space in which details are aligned and decoded.

        Args:
            device: where they are to be: that of the latents or weights they meet.
        """
        shift, scale = (values.to(device) for values in self.adapter.normalisation(self.base))
        if self.config.base_latent_space == "raw":
            return torch.zeros_like(shift), torch.ones_like(scale)
        return shift, scale

    # ------------------------------------------------------------------ the parts

    def reduce(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` at the resolution of the level below; bicubic.

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        self._check_sides(images)
        size = (images.shape[-2] // self.factor, images.shape[-1] // self.factor)
        small = (
            F.interpolate(  # in float32: bfloat16 has no antialiased resize on every device, and would blur
                images.float(),
                size=size,
                mode="bicubic",
                align_corners=False,
                antialias=self.config.antialias,
            )
        )
        return (small.clamp(-1.0, 1.0) if self.config.clamp_base_image else small).to(images.dtype)

    def downsample(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` at base resolution, ``[B, 3, H / s, W / s]``: reduced level by level.

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        small = self.reduce(images)
        return small if self.below is None else self.below.downsample(small)

    @apply_forward_hook
    @torch.no_grad()
    def encode_base(self, images: Tensor) -> Tensor:
        """Raw base latent ``[B, C, h, w]`` of full-resolution images.

        It is the base VAE's own on ``downsample(images)``, bit for bit.
        """
        small = self.reduce(images)
        if self.below is not None:
            return self.below.encode_base(small)
        encode = self._tiled(lambda x: self.adapter.encode(self.base, x), self.base, self.base_compression, 1)
        return self._sliced(encode, small)

    @apply_forward_hook
    def encode_prefix(self, images: Tensor) -> Tensor:
        """Raw latent of everything below this level, means, ``[B, own_layout.base_channels, h, w]``."""
        if self.below is None:
            return self.encode_base(images)
        small = self.reduce(images)
        return self.below.layout.join(self.below.encode_base(small), self.below.encode_details(small).mean)

    @apply_forward_hook
    def encode_details(self, images: Tensor) -> DiagonalGaussianDistribution:
        """Posterior over raw ``z_d``, ``[B, D, h, w]``, of images ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        own = self.encode_own_details(images)
        if self.below is None:
            return own
        lower = self.below.encode_details(self.reduce(images))
        parameters = [lower.mean, own.mean, lower.logvar, own.logvar]
        return DiagonalGaussianDistribution(torch.cat(parameters, dim=1))

    @apply_forward_hook
    def encode_own_details(self, images: Tensor) -> DiagonalGaussianDistribution:
        """As :meth:`encode_details`, but only the channels that this level adds."""
        self._check_sides(images)
        encode = self._tiled(
            lambda x: self.down(self.detail_encoder(x)), self.detail_encoder, self.spatial_compression, 1
        )
        return DiagonalGaussianDistribution(self._sliced(encode, images))

    def _check_sides(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        side = self.spatial_compression
        if height % side or width % side:
            raise DavaeError(
                f"images of {height} x {width} pixels do not fit: sides must be multiples of {side} "
                f"(scale {self.scale} times base compression {self.base_compression})"
            )

    def alignment_target(self, z: Tensor) -> Tensor:
        """The base latent in the space in which details are aligned and decoded (``base_latent_space``).

        Args:
            z: raw, ``[B, C, h, w]``, or with the details of the levels below, which stay as they are.
        """
        if self.config.base_latent_space == "raw":
            return z
        shift, scale = (v[: z.shape[1], None, None] for v in self.base_affine(z.device))
        return ((z.float() - shift) * scale).to(z.dtype)

    @apply_forward_hook
    def decode_structured(self, z: Tensor, z_d: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` from raw ``z`` and raw ``z_d``, with detail dropout in train mode.

        Args:
            z, z_d: ``[B, C, h, w]`` and ``[B, D, h, w]``; with levels below the border between the two may also
                lie in front of this level's own channels. Dropout takes these alone.

        Raises:
            DavaeError: another number of channels.
        """
        if z.shape[1] != self.own_layout.base_channels:
            z, z_d = self.own_layout.split(torch.cat([z, z_d], dim=1))
        if self.training and self.config.detail_dropout > 0:
            uniform = torch.rand(z_d.shape[0], device=z_d.device)
            factor = detail_dropout_factor(uniform, self.config.detail_dropout)
            z_d = z_d * factor.to(z_d.dtype)[:, None, None, None]
        z = self.alignment_target(self._bounded(z))
        latent = self.own_layout.join(z, z_d)
        if self.config.decoder_channel_order == "detail_first":  # the one place where the order differs
            latent = torch.cat([z_d, z], dim=1)
        decode = self._tiled(
            lambda x: self.joint_decoder(self.up(x)), self.joint_decoder, 1, self.spatial_compression
        )
        return self._sliced(decode, latent)

    def _bounded(self, z: Tensor) -> Tensor:
        """A raw latent as the base's decoder takes it; details below have no bounds."""
        bound = self.adapter.network_adapter(self.base).bound
        if self.below is None:
            return bound(z)
        base, details = self.below.layout.split(z)
        return self.below.layout.join(bound(base), details)

    # ------------------------------------------------------------------ the diffusers interface

    @apply_forward_hook
    @takes_single_frame
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[StructuredPosterior]:
        """Images ``[B, 3, H, W]`` in [-1, 1] to a posterior over a pipeline's latents ``[B, C + D, h, w]``.

        As pipelines of video-derived bases call it, ``[B, 3 or 4, 1, H, W]`` is one frame (and opacity, which
        is dropped), and the latents are ``[B, C + D, 1, h, w]``; :meth:`decode` takes those.

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        x = without_alpha(x)
        z = self.encode_base(x)
        details = self.encode_details(x)
        mean, std = self._detail_affine(details.mean.device)
        posterior = StructuredPosterior(
            self.layout,
            z,
            ((details.mean.float() - mean) / std).to(z.dtype),
            (details.std.float() / std).to(z.dtype),
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    @takes_single_frame
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents ``[B, C + D, h, w]`` in the pipelines' convention to images ``[B, 3, H, W]``, not clamped.

        ``generator`` is part of the family's signature; decoding is deterministic.
        """
        base, details = self.layout.split(z)
        mean, std = self._detail_affine(details.device)
        images = self.decode_structured(base, (details.float() * std + mean).to(z.dtype))
        return DecoderOutput(sample=images) if return_dict else (images,)

    def _decode_base(self, z: Tensor) -> Tensor:
        decode = self._tiled(lambda x: self.adapter.decode(self.base, x), self.base, 1, self.base_compression)
        return self._sliced(decode, z)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Encode and decode images ``[B, 3, H, W]``."""
        posterior = self.encode(sample).latent_dist
        latent = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latent, return_dict=return_dict)


register_adapter(AutoencoderDA, NestedAdapter())


# ----------------------------------------------------------------------------------------------------------------
# diffusers runs such a file once for every component and folder, always in the same module. The classes that it
# gets come from a module of their own, run once: models from files of different versions can be used side by side.
_OWN_MODULE = "davae_" + hashlib.sha256(_THIS_FILE.encode()).hexdigest()[:16]
if __name__ != _OWN_MODULE:
    if _OWN_MODULE not in sys.modules:
        _spec = importlib.util.spec_from_file_location(_OWN_MODULE, __file__)
        _module = importlib.util.module_from_spec(_spec)
        sys.modules[_OWN_MODULE] = _module
        _spec.loader.exec_module(_module)
    AutoencoderDA = sys.modules[_OWN_MODULE].AutoencoderDA
