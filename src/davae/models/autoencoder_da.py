"""The detail-aligned autoencoder: a frozen base VAE plus detail channels on the same latent grid."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from davae.errors import DavaeError
from davae.latents import LatentLayout
from davae.models import known_bases  # noqa: F401 (registers the adapters)
from davae.models.base_adapters import constructor_arguments, find_adapter
from davae.models.pipeline_config import DERIVED_KEYS, derived_config
from davae.models.residual_sampling import ResidualDownsample, ResidualUpsample
from davae.models.structured_posterior import StructuredPosterior
from davae.models.tiling import tiled
from davae.models.warm_blocks import warm_down_block, warm_up_block

LatentSpace = Literal["scaled", "raw"]
ChannelOrder = Literal["base_first", "detail_first"]


class AutoencoderDA(ModelMixin, AutoencoderMixin, ConfigMixin):
    """A diffusers autoencoder whose latent is ``[z, z_d]``: the base VAE's latent and ``D`` detail channels.

    ``z`` (``C`` channels) is the base latent of the image at base resolution, untouched. ``z_d`` is encoded
    from the full-resolution image, ``s`` times larger per side, onto the same grid. One decoder makes the
    full-resolution image from both. Make one with :meth:`from_base`; afterwards it stands alone
    (``save_pretrained``, ``from_pretrained``).

    ``encode`` and ``decode`` speak the convention of the base's pipelines: the base part is the base VAE's
    own latent, and the details are normalised so that ``(latent - shift_factor) * scaling_factor`` has unit
    variance on them.

    The base never changes: its weights take no gradient and it stays in eval mode, also after ``train()``.

    Args:
        base_class: class name of the base, see :func:`davae.models.find_adapter`.
        base_config: its config.
        scale: ``s``, 2, 4 or 8.
        detail_channels: ``D``, a multiple of ``s^2 / 2``.
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
        has_base_decoder: False where the base's decoder is not known, as in some published files. Everything
            works without it except :meth:`decode_base`.

    Raises:
        DavaeError: an unknown base, or sizes that do not fit.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["BasicTransformerBlock", "ResnetBlock2D"]  # noqa: RUF012 (the family's form)
    _group_offload_block_modules = ["base", "detail_encoder", "down", "up", "joint_decoder"]  # noqa: RUF012

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
        _check_options(scale, detail_channels, base_latent_space, decoder_channel_order, detail_dropout)
        model_class, self.adapter = find_adapter(base_class)
        self.base = model_class.from_config(base_config)
        self.layout = LatentLayout(self.adapter.latent_channels(self.base), detail_channels)
        self.scale = scale

        branch = self.base if branch_config is None else model_class.from_config(branch_config)
        self.detail_encoder = self.adapter.detail_encoder(branch)
        self.joint_decoder = self.adapter.joint_decoder(branch)
        encoder_features, self.base_compression = self.adapter.probe_encoder(self.detail_encoder)
        decoder_features = self.adapter.decoder_channels(self.joint_decoder)
        self.down = ResidualDownsample(encoder_features, 2 * detail_channels, scale)  # mean and log-variance
        self.up = ResidualUpsample(self.layout.channels, decoder_features, scale)
        self._add_pipeline_parts(self.base)
        if not has_base_decoder:
            self.base.decoder = self.base.post_quant_conv = None
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
            base: a diffusers autoencoder.
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
            model._start_blocks_from_base()
        return model.eval()

    def _add_pipeline_parts(self, base: Any) -> None:
        """Config entries and modules that unmodified pipelines read."""
        further = self.adapter.pipeline_config(base)
        compression = self.spatial_compression
        derived = derived_config(base.config, further, self.layout, scale=self.scale, compression=compression)
        self.register_to_config(**derived)
        for name, module in self.adapter.pipeline_modules(base, self.layout.detail_channels).items():
            setattr(self, name, module.to(device=base.device))

    @torch.no_grad()
    def _start_blocks_from_base(self) -> None:
        shift, scale = self._base_affine()
        head, stem = self.adapter.encoder_head(self.base), self.adapter.decoder_stem(self.base)
        if head is not None:
            warm_down_block(self.down, head.then(torch.diag(scale), -shift * scale), self.layout)
        if stem is not None:
            stem = stem.after(torch.diag(1.0 / scale), shift)
            detail_first = self.config.decoder_channel_order == "detail_first"
            warm_up_block(self.up, stem, self.layout, detail_first=detail_first)

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict, dict, dict]:
        """Config entries that follow from the base are made anew by the constructor."""
        # Without the list of defaulted arguments: statistics that were set later would count as not given.
        dropped = DERIVED_KEYS | {"_use_default_values"}
        own = {key: value for key, value in config_dict.items() if key not in dropped}
        return super().extract_init_dict(own, **kwargs)

    # ------------------------------------------------------------------ what it is

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent position and side, ``s * f``."""
        return self.scale * self.base_compression

    @property
    def last_decoder_weight(self) -> Tensor:
        """Weight of the joint decoder's last convolution: the adaptive GAN weight compares gradients here."""
        return [m for m in self.joint_decoder.modules() if isinstance(m, nn.Conv2d)][-1].weight

    @property
    def alignment_weight(self) -> Tensor:
        """Weight of the down block's convolution, where the adaptive alignment weight compares gradients."""
        return self.down.conv.weight

    def trained_parameters(self) -> Iterator[nn.Parameter]:
        """Everything but the base."""
        for part in (self.detail_encoder, self.down, self.up, self.joint_decoder):
            yield from part.parameters()

    def train(self, mode: bool = True) -> AutoencoderDA:
        """As in torch, but the base stays in eval mode."""
        super().train(mode)
        self.base.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> AutoencoderDA:
        """As in torch, but the base stays frozen."""
        super().requires_grad_(requires_grad)
        self.base.requires_grad_(False)
        return self

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

    # ------------------------------------------------------------------ details: normalisation

    def set_detail_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Keep mean and standard deviation of raw ``z_d`` per channel; encode and decode normalise with them.

        They stand in the config.

        Args:
            mean, std: ``[D]``.

        Raises:
            DavaeError: another length, a value that is not finite, or a standard deviation of 0.
        """
        count = self.layout.detail_channels
        for name, values in (("mean", mean), ("std", std)):
            if values.shape != (count,) or not values.isfinite().all():
                raise DavaeError(
                    f"detail {name} must be {count} finite values, not {tuple(values.shape)}: {values}"
                )
        if not (std > 0).all():
            raise DavaeError(
                f"detail channel {int((std <= 0).nonzero()[0])} is constant: its standard deviation is 0"
            )
        self.register_to_config(detail_mean=mean.tolist(), detail_std=std.tolist())

    def _detail_affine(self) -> tuple[Tensor, Tensor]:
        """``mean`` and ``std``, ``[D, 1, 1]``, with ``z_d = x_d * std + mean`` for a pipeline's ``x_d``."""
        count, config = self.layout.detail_channels, self.config
        mean = torch.tensor(config.detail_mean or [0.0] * count, device=self.device)
        std = torch.tensor(config.detail_std or [1.0] * count, device=self.device)
        scaling, shift = config.scaling_factor or 1.0, config.shift_factor or 0.0
        return (mean - shift * scaling * std)[:, None, None], (scaling * std)[:, None, None]

    def _base_affine(self) -> tuple[Tensor, Tensor]:
        """``shift`` and ``scale``, float32 ``[C]``, of the space in which details are aligned and decoded."""
        shift, scale = self.adapter.normalisation(self.base)
        if self.config.base_latent_space == "raw":
            return torch.zeros_like(shift), torch.ones_like(scale)
        return shift, scale

    # ------------------------------------------------------------------ the parts

    def downsample(self, images: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` at base resolution, ``[B, 3, H / s, W / s]``; bicubic.

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        self._check_sides(images)
        size = (images.shape[-2] // self.scale, images.shape[-1] // self.scale)
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

    @apply_forward_hook
    @torch.no_grad()
    def encode_base(self, images: Tensor) -> Tensor:
        """Raw base latent ``[B, C, h, w]`` of full-resolution images.

        It is the base VAE's own on ``downsample(images)``, bit for bit.
        """
        encode = self._tiled(lambda x: self.adapter.encode(self.base, x), self.base, self.base_compression, 1)
        return self._sliced(encode, self.downsample(images))

    @apply_forward_hook
    def encode_details(self, images: Tensor) -> DiagonalGaussianDistribution:
        """Posterior over raw ``z_d``, ``[B, D, h, w]``, of images ``[B, 3, H, W]`` in [-1, 1].

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
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
        """The base latent in the space in which details are aligned and decoded (``base_latent_space``)."""
        if self.config.base_latent_space == "raw":
            return z
        shift, scale = (v[:, None, None] for v in self._base_affine())
        return ((z.float() - shift) * scale).to(z.dtype)

    @apply_forward_hook
    def decode_structured(self, z: Tensor, z_d: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` from raw ``z`` and raw ``z_d``, with detail dropout in train mode."""
        if self.training and self.config.detail_dropout > 0:
            uniform = torch.rand(z_d.shape[0], device=z_d.device)
            factor = detail_dropout_factor(uniform, self.config.detail_dropout)
            z_d = z_d * factor.to(z_d.dtype)[:, None, None, None]
        return self._decode(z, z_d)

    def _decode(self, z: Tensor, z_d: Tensor) -> Tensor:
        z = self.alignment_target(self.adapter.bound(z))
        latent = self.layout.join(z, z_d)
        if self.config.decoder_channel_order == "detail_first":  # the one place where the order differs
            latent = torch.cat([z_d, z], dim=1)
        decode = self._tiled(
            lambda x: self.joint_decoder(self.up(x)), self.joint_decoder, 1, self.spatial_compression
        )
        return self._sliced(decode, latent)

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

    # ------------------------------------------------------------------ the diffusers interface

    @apply_forward_hook
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[StructuredPosterior]:
        """Images ``[B, 3, H, W]`` in [-1, 1] to a posterior over a pipeline's latents ``[B, C + D, h, w]``.

        Raises:
            DavaeError: sides that are not multiples of ``s * f``.
        """
        z = self.encode_base(x)
        details = self.encode_details(x)
        mean, std = self._detail_affine()
        posterior = StructuredPosterior(
            self.layout,
            z,
            ((details.mean.float() - mean) / std).to(z.dtype),
            (details.std.float() / std).to(z.dtype),
        )
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents ``[B, C + D, h, w]`` in the pipelines' convention to images ``[B, 3, H, W]``, not clamped.

        ``generator`` is part of the family's signature; decoding is deterministic.
        """
        base, details = self.layout.split(z)
        mean, std = self._detail_affine()
        images = self._decode(base, (details.float() * std + mean).to(z.dtype))
        return DecoderOutput(sample=images) if return_dict else (images,)

    @apply_forward_hook
    @torch.no_grad()
    def decode_base(self, latent: Tensor) -> Tensor:
        """A preview, ``[B, 3, H / s, W / s]``: the untouched base VAE on the first ``C`` channels.

        Args:
            latent: in the pipelines' convention, ``[B, C + D, h, w]``, or its base part ``[B, C, h, w]``.

        Raises:
            DavaeError: the model has no base decoder.
        """
        if not self.config.has_base_decoder:
            raise DavaeError("this autoencoder was made without its base's decoder: there is no preview")
        z = latent if latent.shape[1] == self.layout.base_channels else self.layout.split(latent)[0]
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


def detail_dropout_factor(uniform: Tensor, probability: float) -> Tensor:
    """Factor on each sample's detail latent: 0 with ``probability``, else ``1 / (1 - probability)``.

    Args:
        uniform: numbers in [0, 1), ``[B]``; a sample is kept where its number is below ``1 - probability``.
        probability: in [0, 1).
    """
    keep = 1.0 - probability
    return (uniform < keep).to(uniform.dtype) / keep


def _check_options(scale: int, detail_channels: int, space: str, order: str, dropout: float) -> None:
    if scale not in (2, 4, 8):
        raise DavaeError(f"scale must be 2, 4 or 8, not {scale}")
    if detail_channels < 1 or 2 * detail_channels % scale**2:
        raise DavaeError(
            f"detail_channels must be a positive multiple of {scale**2 // 2} for scale {scale}, "
            f"not {detail_channels}"
        )
    if space not in ("scaled", "raw"):
        raise DavaeError(f"base_latent_space must be 'scaled' or 'raw', not '{space}'")
    if order not in ("base_first", "detail_first"):
        raise DavaeError(f"decoder_channel_order must be 'base_first' or 'detail_first', not '{order}'")
    if not 0.0 <= dropout < 1.0:
        raise DavaeError(f"detail_dropout must lie in [0, 1), not {dropout}")
