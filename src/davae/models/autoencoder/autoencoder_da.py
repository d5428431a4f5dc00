"""The detail-aligned autoencoder: a frozen base VAE plus detail channels on the same latent grid."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.choices import AbsentDetails, BlockStart, ChannelOrder, DownMethod, LatentSpace, Scale, check_choice
from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.latents.statistics import check_channel_statistics, check_statistics
from davae.models.autoencoder.pipeline_config import DERIVED_KEYS, derived_config
from davae.models.autoencoder.posterior import EncodedLatents, StructuredPosterior, takes_single_frame, without_alpha
from davae.models.autoencoder.residual_sampling import ResidualUpsample, down_block
from davae.models.autoencoder.tiling import tiled
from davae.models.autoencoder.warm_blocks import start_blocks_from_base
from davae.models.base_adapters import image, video  # noqa: F401  (each registers its adapters)
from davae.models.base_adapters.adapter import constructor_arguments, find_adapter, offloaded_blocks, register_adapter
from davae.models.base_adapters.nested import NestedAdapter
from davae.models.portable import Portable
from davae.runtime.model_files import named_weights, never_filled, not_finite
from davae.runtime.resizing import upscaled


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


class AutoencoderDA(Portable, ModelMixin, AttentionMixin, AutoencoderMixin, ConfigMixin):
    """A diffusers autoencoder whose latent is ``[z, z_d]``: the base VAE's latent and ``D`` detail channels.

    ``z`` (``C`` channels) is the base VAE's latent of the image reduced to base resolution. ``z_d`` is encoded
    from the full-resolution image, ``s`` times larger per side, onto the same grid. One decoder reconstructs the
    full-resolution image from both. Create one with :meth:`from_base`; it is then self-contained
    (``save_pretrained``, ``from_pretrained``).

    ``encode`` and ``decode`` follow the convention of the base's pipelines: the base part is the base VAE's
    own latent, and the details are normalised so that ``(latent - shift_factor) * scaling_factor`` has zero mean
    and unit variance on them.

    The base VAE never changes: its weights take no gradient and it stays in eval mode, even after ``train()``.

    The base may itself be an ``AutoencoderDA``. The latent then has levels, ``[z, z_d1, z_d2]``, and ``z_d`` stands
    for the details of all of them: ``layout``, ``scale``, ``encode``, ``decode``, ``encode_base``,
    ``encode_details`` and ``decode_structured`` refer to the whole latent; ``own_layout``, ``factor``,
    ``encode_prefix`` and ``encode_own_details`` to this level. See :attr:`levels`.

    Args:
        base_class: class name of the base, see :func:`davae.models.find_adapter`.
        base_config: its config.
        scale: 2, 4 or 8: ``s``, or on a base with levels the factor by which this level multiplies its scale.
        detail_channels: ``D``, the channels that this level adds; a multiple of ``s^2 / 2`` for the total ``s``. With 0
            the latent is the base's own, and the decoder upscales (:meth:`without_details`).
        antialias: antialias the bicubic reduction to base resolution.
        clamp_base_image: clamp the reduced image to [-1, 1].
        base_latent_space: the space of ``z`` in the alignment loss and the joint decoder: ``"scaled"``,
            ``(z - shift) * scale`` as in the diffusion model, or ``"raw"``.
        decoder_channel_order: channel order at the input of the up block only; ``"detail_first"`` is for
            published weights. Latents are base first everywhere.
        detail_dropout: probability, in training, of zeroing a sample's whole detail latent before decoding;
            kept ones are scaled by ``1 / (1 - p)``. With 1 the decoder never sees details, in training or after it
            (:attr:`uses_details`).
        absent_details: what stands in for details where there are none, in the training's dropout and where the
            decoder is used alone (:meth:`absent_details`): ``"zero"`` as in the paper, or ``"enlarged"``, the details
            of the base's image, enlarged, which the untrained decoder already knows how to read. Over a base VAE only.
        detail_mean, detail_std: per-channel statistics of ``z_d``; None means 0 and 1. See
            :meth:`set_detail_statistics`.
        branch_config: config of the base class for the detail encoder and the joint decoder, where their
            architecture differs from the base's (same compression).
        has_base_decoder: False if the base's decoder is missing, as in some published files, or dropped
            (:meth:`drop_base_decoder`). Only :meth:`decode_base` and decoding the lower levels need it.
        down_method: of the down block, which makes the details: ``"unshuffle"`` is the residual block of the paper,
            ``"stride"`` one convolution of ``(s + 2) x (s + 2)`` features, which :func:`davae.fit_start` needs.
        enlarged_details: of a latent without details, how many channels of them :meth:`decode` makes by itself from the
            base's image (:meth:`without_details` of ``absent_details="enlarged"``).

    Raises:
        DavaeError: an unknown base or option, or sizes that do not fit.
    """

    __module__ = "davae"  # the library by which saved pipelines know it
    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D", "MemoryEfficientResnetBlock2D"]  # noqa: RUF012 (the form)
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
        down_method: DownMethod = "unshuffle",
        absent_details: AbsentDetails = "zero",
        enlarged_details: int = 0,
    ) -> None:
        super().__init__()
        check_choice(down_method, DownMethod, "down_method")
        _check_options(scale, base_latent_space, decoder_channel_order, detail_dropout)
        _check_absent(absent_details, detail_dropout, detail_channels, enlarged_details, base_class)
        check_channel_statistics("detail_mean", detail_mean, "detail_std", detail_std, detail_channels)
        model_class, self.adapter = find_adapter(base_class)
        self.base = model_class.from_config(base_config)
        check_statistics(self.base.config)
        _check_image_channels(base_class, *self.adapter.image_channels(self.base))
        self.factor, self.scale = scale, scale * self.adapter.scale(self.base)
        _check_detail_channels(detail_channels, self.scale)
        base_layout = self.adapter.latent_layout(self.base)
        self.own_layout = LatentLayout(base_layout.channels, detail_channels)
        self.layout = LatentLayout(base_layout.base_channels, base_layout.detail_channels + detail_channels)

        branch = self.base if branch_config is None else model_class.from_config(branch_config)
        # In this order, which saved averages and moments of earlier runs have.
        detail_encoder = self.adapter.detail_encoder(branch)
        made = detail_channels or enlarged_details
        self.detail_encoder: Any = detail_encoder if made else None
        self.joint_decoder = self.adapter.joint_decoder(branch)
        networks = self.adapter.network_adapter(self.base)
        encoder_features, self.base_compression = networks.probe_encoder(detail_encoder)
        decoder_features = networks.decoder_channels(self.joint_decoder)
        self.down: Any = None
        if made:
            self.down = down_block(encoder_features, made, self.scale, down_method)
        self.up = ResidualUpsample(self.layout.channels + enlarged_details, decoder_features, self.scale)
        self._add_pipeline_parts(self.base)
        self._group_offload_block_modules = [*self._group_offload_block_modules, *offloaded_blocks(self.base)]
        if not has_base_decoder:
            self.adapter.drop_decoder(self.base)
        self.trains_below = False
        self.trains_detail_encoder = True
        self.base.requires_grad_(False).eval()

        self.use_slicing = False
        self.use_tiling = False
        sample_size = self.config.sample_size or 0
        sample_size = max(sample_size) if isinstance(sample_size, (list, tuple)) else sample_size
        # In pixels, as in diffusers; neighbouring tiles overlap by a quarter.
        side = max(int(sample_size), 32 * self.spatial_compression) // self.spatial_compression
        self.tile_sample_min_height = self.tile_sample_min_width = side * self.spatial_compression
        step = (side - round(0.25 * side)) * self.spatial_compression
        self.tile_sample_stride_height = self.tile_sample_stride_width = step

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
        absent_details: AbsentDetails = "zero",
        start: BlockStart = "warm",
    ) -> AutoencoderDA:
        """A new autoencoder on a pretrained base, which is copied and not changed.

        Detail encoder and joint decoder start from the base's weights. The model is in eval mode, like a
        loaded one.

        Args:
            base: a diffusers autoencoder, or an :class:`AutoencoderDA`, which becomes the levels below.
            start: how the two new blocks start. ``"warm"``: from the base's layers that they replace (see
                :mod:`davae.models.autoencoder.warm_blocks`); ``"random"``: torch's initial values, the official start;
                ``"fitted"``: not yet, :func:`davae.fit_start` fits them to images.
            scale, detail_channels, antialias, clamp_base_image, base_latent_space, decoder_channel_order,
            detail_dropout, absent_details:
                see the class.

        Raises:
            DavaeError: an unknown base (the message names the adapter's methods to write), sizes or a start that do
                not fit, or a base whose weights are offloaded, absent or not finite.
        """
        check_choice(start, BlockStart, "start")
        if detail_channels == 0:
            raise DavaeError(
                "a decoder without details is cut out of one that was trained, vae.without_details(); train it with "
                "detail_dropout=1"
            )
        base = getattr(base, "_orig_mod", base)  # of torch.compile
        model_class, _ = find_adapter(type(base).__name__)
        if any(parameter.is_meta for parameter in base.parameters()):
            if empty := never_filled(base):
                raise DavaeError(
                    f"the base's {empty[0]} ({len(empty)} such) holds no numbers: its files lacked it. Open the base "
                    "with davae.load_pipeline, which tells what is wrong with them"
                )
            raise DavaeError("the base's weights are offloaded: take the VAE before offloading is switched on")
        if bad := not_finite(named_weights(base)):
            raise DavaeError(f"the base's {bad[0]} ({len(bad)} such) holds numbers that are not finite")
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
            down_method="stride" if start == "fitted" else "unshuffle",
            absent_details=absent_details,
        )
        for part in model.children():
            nn.Module.to(part, device=base.device, dtype=base.dtype)  # diffusers' own warns of islands
        model.base.load_state_dict(base.state_dict())
        model.detail_encoder.load_state_dict(model.adapter.detail_encoder(base).state_dict())
        model.joint_decoder.load_state_dict(model.adapter.joint_decoder(base).state_dict())
        model._add_pipeline_parts(base)
        if start == "warm":
            start_blocks_from_base(model)
        return model.eval()

    def _add_pipeline_parts(self, base: Any) -> None:
        """Config entries and modules that unmodified pipelines read."""
        further = self.adapter.pipeline_config(base)
        compression = self.spatial_compression
        derived = derived_config(base.config, further, self.own_layout, scale=self.factor, compression=compression)
        self.register_to_config(**derived)
        if "temperal_downsample" in derived:  # pipelines read it from the model
            self.temperal_downsample = derived["temperal_downsample"]
        for name, module in self.adapter.pipeline_modules(base, self.own_layout.detail_channels).items():
            setattr(self, name, module.to(device=base.device))

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers.

        Raises:
            DavaeError: an entry that is derived from the base was edited; it would have no effect.
        """
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        model = made[0] if return_unused_kwargs else made
        for key in sorted(DERIVED_KEYS & config.keys() & model.config.keys()) if isinstance(config, dict) else ():
            stated, derived = (json.loads(json.dumps(values[key])) for values in (config, model.config))
            if stated != derived:
                raise DavaeError(
                    f"config.json has {key} {stated}, but the base in its base_config implies {derived}: restore "
                    "that value. It is derived from the base that the details were trained on; edits have no effect"
                )
        return made

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """As in diffusers, without the entries that the constructor derives from the base."""
        # Also without the list of defaulted arguments, or statistics set later would be reset to their defaults.
        dropped = DERIVED_KEYS | {"_use_default_values"}
        own = {key: value for key, value in config_dict.items() if key not in dropped}
        return super().extract_init_dict(own, **kwargs)

    # ------------------------------------------------------------------ what it is

    @property
    def below(self) -> AutoencoderDA | None:
        """The autoencoder of the level below; None where that is the base VAE."""
        return self.base if isinstance(self.base, AutoencoderDA) else None

    @property
    def spatial_compression(self) -> int:
        """Image pixels per latent position along each side, ``s * f``."""
        return self.scale * self.base_compression

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

    def at_level(self, number: int) -> AutoencoderDA:
        """The autoencoder of a level, 1 or higher: a submodule (or this model itself), not a copy.

        Raises:
            DavaeError: there is no such level.
        """
        for level in self.autoencoders():
            if level.levels[-1].number == number:
                return level
        raise DavaeError(f"there is no level {number} of details: levels are 1 to {self.levels[-1].number}")

    def autoencoders(self) -> Iterator[AutoencoderDA]:
        """The autoencoders of all levels, lowest first, this one last."""
        if self.below is not None:
            yield from self.below.autoencoders()
        yield self

    # ------------------------------------------------------------------ what learns

    @property
    def uses_details(self) -> bool:
        """Whether the decoder sees this level's details. False for a joint decoder alone, the baseline whose gain over
        the enlarged base is that of the decoder: its detail encoder and down block do not learn, or do not exist.
        """
        return bool(self.own_layout.detail_channels and self.config.detail_dropout < 1)

    @property
    def last_decoder_weight(self) -> Tensor:
        """Weight of the joint decoder's last convolution, where the adaptive GAN weight compares gradients."""
        return [m for m in self.joint_decoder.modules() if isinstance(m, nn.Conv2d)][-1].weight

    @property
    def alignment_weight(self) -> Tensor:
        """Weight of the down block's convolution, where the adaptive alignment weight compares gradients."""
        return self.down.conv.weight

    def _learns(self) -> dict[str, bool]:
        """Which parts of the model learn, by name; absent parts are left out."""
        learns = {
            "base": self.trains_below,
            "detail_encoder": self.trains_detail_encoder and self.uses_details,
            "down": self.uses_details,
            "up": True,
            "joint_decoder": True,
        }
        return {name: value for name, value in learns.items() if getattr(self, name) is not None}

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of this level that learn (:meth:`train_levels`), preceded by those of the levels below."""
        if self.below is not None and self.trains_below:
            yield from self.below.trained_parameters()
        for name, learns in self._learns().items():
            if learns and name != "base":
                yield from getattr(self, name).parameters()

    def train(self, mode: bool = True) -> AutoencoderDA:
        """As in torch, but what does not learn (:meth:`train_levels`) stays in eval mode."""
        super().train(mode)
        for name, learns in self._learns().items():
            getattr(self, name).train(mode and learns)
        return self

    def requires_grad_(self, requires_grad: bool = True) -> AutoencoderDA:
        """As in torch, but what does not learn (:meth:`train_levels`) stays frozen."""
        super().requires_grad_(requires_grad)
        for name, learns in self._learns().items():
            getattr(self, name).requires_grad_(requires_grad and learns)
        return self

    def drop_base_decoder(self) -> None:
        """Remove the decoders of all levels below, which :meth:`decode` does not use.

        This saves memory and disk space; previews and lower levels can no longer be decoded.
        """
        self.register_to_config(has_base_decoder=False)
        self.adapter.drop_decoder(self.base)

    @torch.no_grad()
    def without_details(self) -> AutoencoderDA:
        """A copy whose latent is the base's alone, ``[B, C, h, w]``: this one's decoder alone.

        It decodes what an untouched base pipeline samples into images ``s`` times larger per side, as an upscaling
        decoder; its images are this one's with :meth:`absent_details`. Where these are 0, the detail encoder goes, and
        the up block keeps the columns of the base channels, with what its shortcut makes of them.
        """
        base, enlarged = self.base_vae, self.config.absent_details == "enlarged"
        model = AutoencoderDA(
            base_class=type(base).__name__,
            base_config=constructor_arguments(type(base), base.config),
            scale=self.scale,
            detail_channels=0,
            antialias=self.config.antialias,
            clamp_base_image=self.config.clamp_base_image,
            base_latent_space=self.config.base_latent_space,
            branch_config=self.config.branch_config,
            has_base_decoder=self.config.has_base_decoder,
            down_method=self.config.down_method,
            decoder_channel_order=self.config.decoder_channel_order if enlarged else "base_first",
            enlarged_details=self.own_layout.detail_channels if enlarged else 0,
        )
        for part in model.children():
            nn.Module.to(part, device=self.device, dtype=self.dtype)
        if enlarged:
            model.load_state_dict(self.state_dict())
            return model.eval()
        model.base.load_state_dict(base.state_dict())
        model.joint_decoder.load_state_dict(self.joint_decoder.state_dict())
        first = self.own_layout.detail_channels if self.config.decoder_channel_order == "detail_first" else 0
        kept = slice(first, first + self.layout.base_channels)
        model.up.conv.weight.zero_()
        own_shortcut = model.up.columns(slice(None))
        model.up.conv.weight.copy_(self.up.columns(kept) - own_shortcut)
        model.up.conv.bias.copy_(self.up.conv.bias)
        model._add_pipeline_parts(base)
        return model.eval()

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None) -> None:
        """As in diffusers: detail encoder and joint decoder recompute activations in the backward pass.

        Raises:
            DavaeError: the adapter's networks do not support it, so the call would have no effect.
        """
        for name in ("detail_encoder", "joint_decoder"):
            if getattr(self, name) is None:
                continue
            if not any(hasattr(module, "gradient_checkpointing") for module in getattr(self, name).modules()):
                raise DavaeError(
                    f"{name} of {type(self.adapter).__name__} does not support gradient checkpointing: build it with "
                    "davae.models.base_adapters.adapter.FeatureChain, or leave gradient_checkpointing off"
                )
        super().enable_gradient_checkpointing(gradient_checkpointing_func)

    def train_levels(self, *, together: bool, detail_encoders: bool = True) -> None:
        """Choose what trains: this level alone (the default) or all levels together. The base VAE never trains.

        Args:
            together: all levels.
            detail_encoders: of these levels too; False trains the new blocks and the decoders only.

        Raises:
            DavaeError: ``together``, but the lower levels' decoders were dropped.
        """
        self.trains_detail_encoder = detail_encoders
        if self.below is not None:
            if together and not self.config.has_base_decoder:
                raise DavaeError("the lower levels have no decoders left: they cannot be trained")
            self.trains_below = together
            self.below.train_levels(together=together, detail_encoders=detail_encoders)
        self.requires_grad_(True)
        self.train(self.training)

    # ------------------------------------------------------------------ the parts, of raw latents

    def base_affine(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``shift`` and ``scale``, float32 ``[C]``, of the space in which details are aligned and decoded.

        Args:
            device: device of the result.
        """
        shift, scale = (values.to(device) for values in self.adapter.normalisation(self.base))
        if self.config.base_latent_space == "raw":
            return torch.zeros_like(shift), torch.ones_like(scale)
        return shift, scale

    def reduce(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` at the resolution of the level below; bicubic.

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        self._check_sides(images)
        size = (images.shape[-2] // self.factor, images.shape[-1] // self.factor)
        small = F.interpolate(  # in float32: not every device antialiases in bfloat16, whose rounding also blurs
            images.float(), size=size, mode="bicubic", align_corners=False, antialias=self.config.antialias
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

        Bit-identical to the base VAE's own latent of ``downsample(images)`` (without tiling).
        """
        small = self.reduce(images)
        if self.below is not None:
            return self.below.encode_base(small)
        encode = self._tiled(lambda x: self.adapter.encode(self.base, x), self.base, self.base_compression, 1)
        return self._sliced(encode, small)

    @apply_forward_hook
    def encode_prefix(self, images: Tensor) -> Tensor:
        """Raw latent of all levels below (posterior means), ``[B, own_layout.base_channels, h, w]``."""
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
        if not self.own_layout.detail_channels:
            none = images.new_zeros(len(images), 0, *(side // self.spatial_compression for side in images.shape[-2:]))
            return DiagonalGaussianDistribution(none)
        return self._own_details(images)

    def _own_details(self, images: Tensor) -> DiagonalGaussianDistribution:
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

    def drop_details(self, prefix: Tensor, z_d: Tensor, *, rescale: bool = True) -> tuple[Tensor, Tensor]:
        """This level's ``z_d`` for :meth:`decode_structured`; in train mode ``detail_dropout`` takes samples' away.

        Args:
            prefix: the latent below, ``[B, own_layout.base_channels, h, w]``.
            z_d: ``[B, D, h, w]``.
            rescale: divide the others by the share that is kept, as the official code does; not with
                ``absent_details="enlarged"``, which leaves no zeros to make up for.

        Returns:
            The details, with :meth:`absent_details` where there are none, and whether there are none, ``[B]``.
        """
        if not (self.training and self.uses_details) or self.config.detail_dropout <= 0:
            return z_d, torch.zeros(len(z_d), dtype=torch.bool, device=z_d.device)
        uniform = torch.rand(z_d.shape[0], device=z_d.device)
        factor = detail_dropout_factor(uniform, self.config.detail_dropout)
        absent = factor == 0
        if self.config.absent_details == "enlarged":  # of all samples, for the same passes in every process
            return torch.where(absent[:, None, None, None], self.absent_details(prefix).to(z_d.dtype), z_d), absent
        factor = factor if rescale else factor.clamp(max=1.0)
        return z_d * factor.to(z_d.dtype)[:, None, None, None], absent

    @torch.no_grad()
    def absent_details(self, prefix: Tensor) -> Tensor:
        """What stands in for details where there are none, ``[B, D, h, w]``: see the class.

        With ``"enlarged"`` they are encoded from the base's image, decoded from ``prefix`` and enlarged bicubically.

        Args:
            prefix: the raw base latent, or the latent of all levels below: the result is what the whole latent has
                beside it.

        Raises:
            DavaeError: that image is needed, and the base's decoder was dropped.
        """
        if self.config.absent_details == "enlarged":
            return self._details_of_enlarged(prefix)
        return prefix.new_zeros(len(prefix), self.layout.channels - prefix.shape[1], *prefix.shape[-2:])

    def decode_alone(self, prefix: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` of the decoder alone: :meth:`decode_structured` with :meth:`absent_details`.

        Args:
            prefix: as for :meth:`absent_details`.
        """
        return self.decode_structured(prefix, self.absent_details(prefix))

    def _details_of_enlarged(self, z: Tensor) -> Tensor:
        small = self.decode_base(z).clamp(-1, 1)
        size = (small.shape[-2] * self.scale, small.shape[-1] * self.scale)
        return self._own_details(upscaled(small, size).to(z.dtype)).mean

    @apply_forward_hook
    def decode_structured(self, z: Tensor, z_d: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` from raw ``z`` and raw ``z_d``; without :attr:`uses_details` from ``z`` alone.

        Args:
            z, z_d: ``[B, C, h, w]`` and ``[B, D, h, w]``; with levels, the split may also be the one of
                ``own_layout``.

        Raises:
            DavaeError: another number of channels.
        """
        if z.shape[1] != self.own_layout.base_channels:
            z, z_d = self.own_layout.split(torch.cat([z, z_d], dim=1))
        if not self.uses_details:
            z_d = torch.zeros_like(z_d)
        raw, z = z, self.decoded_prefix(z)
        latent = self.own_layout.join(z, z_d)
        if self.config.enlarged_details:
            z_d = self._details_of_enlarged(raw)
            latent = torch.cat([z, z_d], dim=1)
        if self.config.decoder_channel_order == "detail_first":  # the one place where the order differs
            latent = torch.cat([z_d, z], dim=1)
        decode = self._tiled(lambda x: self.joint_decoder(self.up(x)), self.joint_decoder, 1, self.spatial_compression)
        return self._sliced(decode, latent)

    def decoded_prefix(self, z: Tensor) -> Tensor:
        """A raw latent ``[B, C, h, w]`` of the levels below as the up block takes it: bounded, then scaled.

        The bound is the base decoder's own, such as TAESD's soft clamp; details of lower levels are unbounded.
        """
        bound = self.adapter.network_adapter(self.base).bound
        if self.below is None:
            return self.alignment_target(bound(z))
        base, details = self.below.layout.split(z)
        return self.alignment_target(self.below.layout.join(bound(base), details))

    # ------------------------------------------------------------------ the statistics of the details

    # Every level stores those of its own channels in its own config. The networks see raw details; the statistics
    # apply only in encode and decode, so they can be measured again after training.

    def set_detail_statistics(self, mean: Tensor, std: Tensor, *, level: int | None = None) -> None:
        """Store the per-channel mean and standard deviation of raw ``z_d``, with which encode and decode normalise.

        They are saved in the config.

        Args:
            mean, std: ``[D]``, of the channels that the level adds.
            level: 1 for the lowest; None for the last.

        Raises:
            DavaeError: no such level, another length, a value that is not finite, or a standard deviation that is
                not positive, as for a constant channel.
        """
        if level is not None and level != self._number():
            if self.below is None:
                raise DavaeError(f"there is no level {level} of details: the lowest is {self._number()}")
            self.below.set_detail_statistics(mean, std, level=level)
            # This level's config contains the one below, and a saved model is rebuilt from it.
            arguments = constructor_arguments(type(self.below), self.below.config)
            self.register_to_config(base_config=arguments)
            return
        check_channel_statistics("detail_mean", mean, "detail_std", std, self.own_layout.detail_channels)
        self.register_to_config(detail_mean=mean.tolist(), detail_std=std.tolist())

    def detail_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw ``z_d`` over all levels, float32 ``[D]`` each, on the CPU."""
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
            device: that of ``x_d``; the model's own is not reliable while its weights are offloaded.
        """
        mean, std = (values.to(device) for values in self.detail_statistics())
        scaling, shift = self.config.scaling_factor or 1.0, self.config.shift_factor or 0.0
        return (mean - shift * scaling * std)[:, None, None], (scaling * std)[:, None, None]

    def _number(self) -> int:
        return 1 if self.below is None else 1 + self.below._number()

    # ------------------------------------------------------------------ the diffusers interface

    @apply_forward_hook
    @takes_single_frame
    def encode(self, x: Tensor, return_dict: bool = True) -> EncodedLatents | tuple[StructuredPosterior]:
        """Images ``[B, 3, H, W]`` in [-1, 1] to a posterior over a pipeline's latents ``[B, C + D, h, w]``.

        ``x`` is converted to the model's dtype, except under autocast. The latents have the narrower dtype of the two,
        because an autoencoder may be more precise than its pipeline.

        Pipelines of video-derived bases pass a single frame ``[B, 3 or 4, 1, H, W]`` (an alpha channel is
        dropped) and get latents ``[B, C + D, 1, h, w]``, which :meth:`decode` accepts.

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        given, x = x.dtype, self._in_own_precision(without_alpha(x))
        z = self.encode_base(x)
        details = self.encode_details(x)
        mean, std = self._detail_affine(details.mean.device)
        dtype = min(given, z.dtype, key=lambda d: d.itemsize)  # pipelines mix these latents with their own noise
        parts = (z, (details.mean.float() - mean) / std, details.std.float() / std)
        posterior = StructuredPosterior(self.layout, *(part.to(dtype) for part in parts))
        return EncodedLatents(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    @takes_single_frame
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents ``[B, C + D, h, w]`` in the pipelines' convention to images ``[B, 3, H, W]``, not clamped.

        ``z`` is converted to the model's dtype, except under autocast. ``generator`` is unused, for compatibility.
        """
        z = self._in_own_precision(z)
        base, details = self.layout.split(z)
        mean, std = self._detail_affine(details.device)
        images = self.decode_structured(base, (details.float() * std + mean).to(z.dtype))
        return DecoderOutput(sample=images) if return_dict else (images,)

    def _in_own_precision(self, x: Tensor) -> Tensor:
        """``x`` in the model's dtype, from which that of a pipeline's other components may differ."""
        return x if x.dtype == self.dtype or torch.is_autocast_enabled(x.device.type) else x.to(self.dtype)

    @apply_forward_hook
    def decode_level(self, latent: Tensor, level: int) -> Tensor:
        """The image of one level, ``[B, 3, h * f * scale, w * f * scale]`` with that level's scale.

        Channels of higher levels are ignored.

        Args:
            latent: in the pipelines' convention, ``[B, n, h, w]`` with at least the level's channels.
            level: 0 decodes the base channels with the base VAE, the last level the whole latent.

        Raises:
            DavaeError: no such level, too few channels, or a lower level of a model without base decoder.
        """
        levels = self.levels
        if not 0 <= level < len(levels):
            raise DavaeError(f"there is no level {level}: levels are 0 to {levels[-1].number}")
        channels = levels[level].layout.channels
        if latent.shape[1] < channels:
            raise DavaeError(f"level {level} needs {channels} channels, the latent has {latent.shape[1]}")
        latent = latent[:, :channels]
        if level == levels[-1].number:
            return self.decode(latent).sample
        if not self.config.has_base_decoder:
            raise DavaeError("this autoencoder has no base decoder: only its last level can be decoded")
        if self.below is not None:
            return self.below.decode_level(latent, level)
        return self._decode_base(latent)

    @apply_forward_hook
    @torch.no_grad()
    def decode_base(self, latent: Tensor) -> Tensor:
        """A preview, ``[B, 3, H / s, W / s]``: the base VAE's decoding of the first ``C`` channels.

        Args:
            latent: in the pipelines' convention, ``[B, C + D, h, w]``, or its base part ``[B, C, h, w]``.

        Raises:
            DavaeError: the model has no base decoder.
        """
        return self.decode_level(latent, 0)

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
        """Encode and decode images ``[B, 3, H, W]``, through the posterior's mode or a sample of it."""
        posterior = self.encode(sample).latent_dist
        latent = posterior.sample(generator) if sample_posterior else posterior.mode()
        return self.decode(latent, return_dict=return_dict)

    # ------------------------------------------------------------------ large inputs

    def enable_tiling(
        self,
        tile_sample_min_size: int | None = None,
        tile_overlap_factor: float | None = None,
        *,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_sample_stride_height: int | None = None,
        tile_sample_stride_width: int | None = None,
    ) -> None:
        """Encode and decode larger images in overlapping tiles; see :func:`davae.models.autoencoder.tiling.tiled`.

        All sizes are in pixels of the full-resolution image, multiples of ``s * f``. Arguments left out keep their
        values; a new size without a stride keeps the fraction of overlap.

        Args:
            tile_sample_min_size: side of a square tile.
            tile_overlap_factor: fraction of a tile that overlaps its neighbour, in [0, 0.5].
            tile_sample_min_height, tile_sample_min_width: sides of a tile, as in diffusers.
            tile_sample_stride_height, tile_sample_stride_width: distance between tiles, from half a side to a full one.

        Raises:
            DavaeError: a value out of range, or arguments that contradict or repeat each other.
        """
        if tile_sample_min_size is not None and (tile_sample_min_height, tile_sample_min_width) != (None, None):
            raise DavaeError("tile_sample_min_size sets both sides of a tile: pass either it or the height and width")
        if tile_overlap_factor is not None:
            if (tile_sample_stride_height, tile_sample_stride_width) != (None, None):
                raise DavaeError("tile_overlap_factor and the strides both set the overlap: pass only one of them")
            if not 0.0 <= tile_overlap_factor <= 0.5:
                raise DavaeError(f"tile_overlap_factor must lie in [0, 0.5], not {tile_overlap_factor}")
        cell = self.spatial_compression
        chosen: dict[str, int] = {}
        for side, size, stride in (
            ("height", tile_sample_min_height, tile_sample_stride_height),
            ("width", tile_sample_min_width, tile_sample_stride_width),
        ):
            before = getattr(self, f"tile_sample_min_{side}")
            size = next((given for given in (size, tile_sample_min_size) if given is not None), before)
            _check_tile(f"tile size {size}", size, cell, cell, None)
            if stride is None:
                kept = 1 - getattr(self, f"tile_sample_stride_{side}") / before
                overlap = kept if tile_overlap_factor is None else tile_overlap_factor
                stride = size - round(size // cell * overlap) * cell
            else:
                _check_tile(f"tile_sample_stride_{side} {stride}", stride, cell, size / 2, size)
            chosen |= {f"tile_sample_min_{side}": size, f"tile_sample_stride_{side}": stride}
        self.use_tiling = True
        for name, size in chosen.items():
            setattr(self, name, size)
        if self.below is not None:  # the same tiles in latent positions
            self.below.enable_tiling(**{name: size // self.factor for name, size in chosen.items()})

    def disable_tiling(self) -> None:
        """Encode and decode whole images at once."""
        self._switch("use_tiling", on=False)

    def enable_slicing(self) -> None:
        """Encode and decode one sample of a batch at a time."""
        self._switch("use_slicing", on=True)

    def disable_slicing(self) -> None:
        """Encode and decode whole batches at once."""
        self._switch("use_slicing", on=False)

    def _switch(self, name: str, *, on: bool) -> None:
        setattr(self, name, on)
        if self.below is not None:
            self.below._switch(name, on=on)

    def _tiled(
        self, function: Callable[[Tensor], Tensor], network: nn.Module, cell_in: int, cell_out: int
    ) -> Callable[[Tensor], Tensor]:
        """``function``, which calls ``network``, run in tiles if tiling is on and the input is larger than a tile."""
        tile, step = (
            tuple(
                getattr(self, f"tile_sample_{what}_{side}") // self.spatial_compression for side in ("height", "width")
            )
            for what in ("min", "stride")
        )

        def apply(x: Tensor) -> Tensor:
            if not self.use_tiling or all(size <= side * cell_in for size, side in zip(x.shape[-2:], tile)):
                return function(x)
            overlap = (tile[0] - step[0], tile[1] - step[1])
            return tiled(
                function,
                x,
                tile=(tile[0], tile[1]),
                overlap=overlap,
                cell_in=cell_in,
                cell_out=cell_out,
                networks=[network],
            )

        return apply

    def _sliced(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``function(x)``, one sample at a time if slicing is on."""
        if self.use_slicing and x.shape[0] > 1:
            return torch.cat([function(part) for part in x.split(1)])
        return function(x)


def _check_tile(what: str, size: Any, cell: int, least: float, most: int | None) -> None:
    """Raise a :class:`DavaeError` unless ``size`` is a multiple of ``cell`` in ``[least, most]``."""
    if isinstance(size, bool) or not isinstance(size, int) or size % cell:
        raise DavaeError(f"{what} is not a multiple of {cell} pixels")
    if size < least or (most is not None and size > most):
        raise DavaeError(f"{what} must be at least {least:g}{'' if most is None else f' and at most {most}'} pixels")


def _check_options(scale: int, space: str, order: str, dropout: float) -> None:
    """Raise a :class:`DavaeError` for an invalid option, in the order of the constructor."""
    check_choice(scale, Scale, "scale")
    check_choice(space, LatentSpace, "base_latent_space")
    check_choice(order, ChannelOrder, "decoder_channel_order")
    if not 0.0 <= dropout <= 1.0:
        raise DavaeError(f"detail_dropout must lie in [0, 1], not {dropout}")


def _check_absent(absent: str, dropout: float, details: int, enlarged: int, base_class: str) -> None:
    """Raise a :class:`DavaeError` for options of absent details that do not fit each other."""
    check_choice(absent, AbsentDetails, "absent_details")
    if enlarged and details:
        raise DavaeError(f"enlarged_details={enlarged} is of a latent without details, and detail_channels={details}")
    if absent == "enlarged" and base_class == "AutoencoderDA":
        raise DavaeError('absent_details="enlarged" is for details over a base VAE, and this base has details itself')
    if absent == "enlarged" and dropout == 1:
        raise DavaeError('absent_details="enlarged" takes details, which with detail_dropout=1 are never trained')


def _check_image_channels(name: str, taken: int, given: int) -> None:
    """Raise a :class:`DavaeError` for a base that is not an RGB autoencoder."""
    if (taken, given) != (3, 3):
        raise DavaeError(
            f"this {name} takes images of {taken} channels and gives {given}: the base must be an autoencoder of "
            "colour images, with 3 channels in and out"
        )


def _check_detail_channels(detail_channels: int, scale: int) -> None:
    """Raise a :class:`DavaeError` for a channel count that the down block of factor ``scale`` cannot produce."""
    if detail_channels < 0 or 2 * detail_channels % scale**2:
        raise DavaeError(
            f"detail_channels must be a positive multiple of {scale**2 // 2} for scale {scale}, not {detail_channels}"
        )


def detail_dropout_factor(uniform: Tensor, probability: float) -> Tensor:
    """Factor on each sample's detail latent: 0 with ``probability``, else ``1 / (1 - probability)``.

    Args:
        uniform: numbers in [0, 1), ``[B]``; a sample is kept where its number is below ``1 - probability``.
        probability: in [0, 1).
    """
    keep = 1.0 - probability
    return (uniform < keep).to(uniform.dtype) / keep


register_adapter(AutoencoderDA, NestedAdapter())
