"""What davae must know about a base: where its encoder's last and its decoder's first features are.

The classes of :mod:`davae.models.base_adapters.image` and ``video`` are registered. Any other image autoencoder needs a
:class:`BaseAdapter` with two methods and a call of :func:`register_adapter`.
"""

from __future__ import annotations

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

from davae.errors import DavaeError
from davae.import_hooks import call_plugins
from davae.latents import LatentLayout, latent_affine

_PROBE_SIDE = 256  # pixels; reveals any compression up to 256, and costs nothing on the meta device


@dataclass(frozen=True)
class Convolution:
    """The values of a convolution: ``weight`` ``[out, in, k, k]`` (3x3 unless stated) and ``bias`` ``[out]``."""

    weight: Tensor
    bias: Tensor

    def plus_centre(self, matrix: Tensor) -> Convolution:
        """The sum of this 3x3 convolution and the 1x1 convolution ``matrix``, ``[out, in]``."""
        weight = self.weight.clone()
        weight[:, :, 1, 1] += matrix.to(weight)
        return Convolution(weight, self.bias)

    def then(self, matrix: Tensor, offset: Tensor) -> Convolution:
        """Followed by ``y -> matrix y + offset``. Exact."""
        weight = torch.einsum("oi,ichw->ochw", matrix, self.weight)
        return Convolution(weight, matrix @ self.bias + offset)

    def after(self, matrix: Tensor, offset: Tensor) -> Convolution:
        """Preceded by ``x -> matrix x + offset``.

        Exact except at the border, where the zero padding lacks the offset.
        """
        bias = self.bias + torch.einsum("oihw,i->o", self.weight, offset)
        return Convolution(torch.einsum("oihw,ic->ochw", self.weight, matrix), bias)


class BaseAdapter(ABC):
    """Describes one autoencoder class to davae: two methods are abstract, the others have defaults."""

    @abstractmethod
    def detail_encoder(self, base: Any) -> nn.Module:
        """A copy of the encoder that stops at its last features.

        It maps images ``[B, 3, H, W]`` to ``[B, F, H / f, W / f]``.

        It must not contain the layers after those features, which would sit unused in the state dict.
        """

    @abstractmethod
    def joint_decoder(self, base: Any) -> nn.Module:
        """A copy of the decoder that begins at its first features.

        It maps ``[B, F, h, w]`` to images ``[B, 3, f h, f w]``.
        """

    def encode(self, base: Any, images: Tensor) -> Tensor:
        """The raw base latent ``[B, C, h, w]``: the posterior's mode, or the latent of a deterministic base.

        Raises:
            DavaeError: ``base.encode`` returns neither.
        """
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
        """Images ``[B, 3, f h, f w]`` from raw base latents ``[B, C, h, w]``."""
        return base.decode(z).sample

    def latent_channels(self, base: Any) -> int:
        """``C``."""
        return int(base.config.latent_channels)

    def image_channels(self, base: Any) -> tuple[int, int]:
        """Channels of the images taken and given, after this adapter has added or dropped an alpha channel."""
        return int(base.config.get("in_channels", 3)), int(base.config.get("out_channels", 3))

    def latent_layout(self, base: Any) -> LatentLayout:
        """The base's own base and detail channels; only a base with levels has detail channels."""
        return LatentLayout(self.latent_channels(base), 0)

    def scale(self, base: Any) -> int:
        """Resolution of its images per side as a multiple of the pretrained VAE's; 1 for a base without levels."""
        return 1

    def network_adapter(self, base: Any) -> BaseAdapter:
        """The adapter of the pretrained VAE, whose networks are copied; this one for a base without levels."""
        return self

    def drop_decoder(self, base: Any) -> None:
        """Remove the decoder from the base."""
        base.decoder = base.post_quant_conv = None

    def probe_encoder(self, detail_encoder: nn.Module) -> tuple[int, int]:
        """Feature channels ``F`` and compression ``f`` of the detail encoder, from a run on the meta device."""
        tensors = {**dict(detail_encoder.named_parameters()), **dict(detail_encoder.named_buffers())}
        dtype = next(detail_encoder.parameters()).dtype
        images = torch.empty(1, 3, _PROBE_SIDE, _PROBE_SIDE, device="meta", dtype=dtype)
        with torch.no_grad():
            weights = {name: tensor.to("meta") for name, tensor in tensors.items()}
            features = functional_call(detail_encoder, weights, (images,))
        return features.shape[1], _PROBE_SIDE // features.shape[-1]

    def decoder_channels(self, joint_decoder: nn.Module) -> int:
        """Input channels of the joint decoder's first layer with weights; a :class:`DavaeError` if it has none."""
        for module in joint_decoder.modules():
            for name in ("in_channels", "num_channels", "in_features"):
                if isinstance(getattr(module, name, None), int) and next(module.parameters(), None) is not None:
                    return int(getattr(module, name))
        raise DavaeError(
            f"cannot find how many channels the joint decoder takes: override {type(self).__name__}.decoder_channels"
        )

    def normalisation(self, base: Any) -> tuple[Tensor, Tensor]:
        """``shift`` and ``scale``, float32 ``[C]``: diffusion models see ``(z - shift) * scale``.

        They may be on any device; callers move them to the latent's, because the base's own device is not
        reliable while its weights are offloaded.
        """
        return latent_affine(base.config, self.latent_channels(base))

    def bound(self, z: Tensor) -> Tensor:
        """What the base's decoder does to a raw latent before its first layer, such as a soft clamp."""
        return z

    def encoder_head(self, base: Any) -> Convolution | None:
        """The map from last features to the raw latent's mean as one 3x3 convolution; None if it is not one."""
        return None

    def decoder_stem(self, base: Any) -> Convolution | None:
        """The map from raw (bounded) latent to first features as one 3x3 convolution; None if it is not one."""
        return None

    def pipeline_config(self, base: Any) -> dict[str, Any]:
        """Additional config entries that pipelines of this base read."""
        return {}

    def pipeline_modules(self, base: Any, detail_channels: int) -> dict[str, nn.Module]:
        """Additional modules that pipelines of this base read."""
        return {}


class Stages(nn.Module):
    """A sequence of stages, each with gradient checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # diffusers sets both
        self._gradient_checkpointing_func: Callable[..., Tensor] | None = None

    def through(self, stages: Iterable[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """Apply the stages to ``x`` in order."""
        for stage in stages:
            if self._gradient_checkpointing_func and self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(stage, x)
            else:
                x = stage(x)
        return x


class FeatureChain(Stages):
    """Copies of the given stages, applied in order."""

    def __init__(self, stages: Iterable[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(copy.deepcopy(stage) for stage in stages)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all stages."""
        return self.through(self.stages, x)


_ADAPTERS: dict[str, tuple[type[ModelMixin], BaseAdapter]] = {}


def register_adapter(base_class: type[ModelMixin], adapter: BaseAdapter) -> None:
    """Make ``base_class`` usable as a base. Call it on import, before models with that base are loaded.

    Args:
        base_class: a diffusers image autoencoder, 3 channels in and out.
        adapter: its adapter; replaces an earlier one of the same class name.
    """
    _ADAPTERS[base_class.__name__] = (base_class, adapter)


def find_adapter(name: str) -> tuple[type[ModelMixin], BaseAdapter]:
    """Class and adapter of a base by its class name.

    Adapters of plug-ins (``davae.adapters``) are known too.

    Raises:
        DavaeError: no adapter is registered; the message says what to write.
    """
    call_plugins("davae.adapters")
    if name not in _ADAPTERS:
        raise DavaeError(
            f"{name} is not a base that davae knows ({', '.join(_ADAPTERS)}). To use it, subclass "
            "davae.models.BaseAdapter, write its methods detail_encoder(base) (a copy of the encoder that "
            "stops at its last features) and joint_decoder(base) (a copy of the decoder that begins at its "
            "first features), "
            f"and call davae.models.register_adapter({name}, adapter) before making or loading the model"
        )
    return _ADAPTERS[name]


def adapter_of(model: ModelMixin) -> BaseAdapter | None:
    """The adapter of a model's class or of its nearest registered ancestor; None if there is none."""
    call_plugins("davae.adapters")
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    named = (_ADAPTERS.get(cls.__name__) for cls in type(model).__mro__)
    return next((found[1] for found in named if found is not None), None)


def constructor_arguments(base_class: type[ModelMixin], config: Any) -> dict[str, Any]:
    """The part of a model's config that its constructor takes."""
    taken = inspect.signature(base_class.__init__).parameters
    return {key: value for key, value in config.items() if key in taken}


def offloaded_blocks(base: ModelMixin) -> list[str]:
    """Names of the base's submodules that are groups of their own in group offloading.

    Group offloading loads weights when a module's ``forward`` runs, but a base is called through ``encode`` and
    ``decode``, so its submodules must be separate groups: all of them, unless its class names some.
    """
    named = getattr(base, "_group_offload_block_modules", None)
    return list(named or [name for name, _ in base.named_children()])
